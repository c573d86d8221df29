"""A released folder that an export shall be like: its small files, and the bytes of its INT4 weights."""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from k25_train import int4
from k25_train.errors import CheckpointError
from k25_train.export.listing import Contents
from k25_train.export.writer import placed
from k25_train.int4 import Int4Weight

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_COPIED = (".json", ".jinja", ".model", ".py", ".txt", ".tiktoken")
_COPIED_NAMES = ("LICENSE", "THIRD_PARTY_NOTICES.md")
_MOST_BYTES = 256 * 2**20
"""Larger ones are no tokenizer."""


class ReleasedFolder:
    """A Hugging Face folder on disk, as far as an export takes anything from it."""

    def __init__(self, folder: Path) -> None:
        """Reads config.json. Raises `CheckpointError` if it is missing or no JSON object."""
        self.folder = folder
        self.config: dict[str, Any] = _object(folder / CONFIG)
        self._open = ExitStack()
        self._files: dict[str, Any] = {}

    @property
    def contents(self) -> Contents:
        """Whether it has a vision part."""
        return Contents.all if "vision_config" in self.config else Contents.text

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Its language model's configuration."""
        text: Mapping[str, Any] = self.config.get("text_config") or self.config
        return text

    def check_fits(self, expected: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` if its language model has other values of `expected` than these."""
        keys = [key for key in expected if key in self.text_config]
        wrong = [
            f"{key}: {self.text_config[key]} there, {expected[key]} here"
            for key in keys
            if self.text_config[key] != expected[key]
        ]
        if wrong:
            raise CheckpointError(
                f"{self.folder / CONFIG} is of another model than the checkpoint ({'; '.join(wrong)}); "
                "name a released folder of the same model, or none"
            )

    def small_files(self) -> list[Path]:
        """What belongs to tokenizer, processor and model code; config.json and weights are written here."""
        return [
            path
            for path in sorted(self.folder.iterdir())
            if (path.suffix in _COPIED or path.name in _COPIED_NAMES)
            and path.name not in (CONFIG, INDEX)
            and path.is_file()
            and path.stat().st_size <= _MOST_BYTES
        ]

    def copy_small_files(self, out: Path) -> None:
        """Copy them, links as what they point to."""
        for path in self.small_files():
            with placed(out / path.name) as own:
                shutil.copyfile(path, own)

    def requantize(self, name: str, weight: Tensor) -> Int4Weight:
        """`int4.requantize`, with this folder's bytes wherever its weights are unchanged.

        Raises `CheckpointError` if its tensors of this name have other shapes, or cannot be read.
        """
        ours = int4.requantize(weight)
        if f"{name}_packed" not in self._places:
            return ours
        packed, scale = self._read(f"{name}_packed"), self._read(f"{name}_scale")
        fits = packed.shape == ours.packed.shape and scale.shape == ours.scale.shape
        if not fits or packed.dtype != torch.int32 or scale.dtype != torch.bfloat16:
            raise CheckpointError(
                f"{self.folder}: has it as {list(packed.shape)} {packed.dtype} with scales "
                f"{list(scale.shape)} {scale.dtype}, which is not the release's INT4"
            )
        return int4.keep_released(ours, weight, Int4Weight(packed, scale))

    @cached_property
    def _places(self) -> Mapping[str, str]:
        """Name of each tensor -> its file."""
        if (self.folder / INDEX).is_file():
            places: Mapping[str, str] = _object(self.folder / INDEX)["weight_map"]
            return places
        files = [path.name for path in self.folder.glob("*.safetensors")]
        return {name: file for file in files for name in self._file(file).keys()}  # noqa: SIM118

    def _read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file(self._places[name]).get_tensor(name)
        except (KeyError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read ({error})") from error
        return tensor

    def _file(self, name: str) -> Any:
        if name not in self._files:
            opened = safe_open(self.folder / Path(name).name, framework="pt")
            self._files[name] = self._open.enter_context(opened)
        return self._files[name]


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: missing or unreadable ({error}); name a Hugging Face folder"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is no JSON object; name a Hugging Face folder")
    return values

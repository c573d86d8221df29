"""A folder of safetensors files as a stream of named tensors."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.base import EngineError


def folder_tensors(folder: Path) -> Iterator[NamedTensor]:
    """Every tensor of a folder's safetensors files, read when it is asked for.

    Raises `EngineError` that names a folder without such a file, or a file that is damaged.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise EngineError(f"{folder}: has no .safetensors file")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    yield NamedTensor(name, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{path}: {error}") from error

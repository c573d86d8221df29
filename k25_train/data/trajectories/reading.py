"""Reads a step's file in parts: what describes its trajectories at once, each of them when asked for."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from k25_train.data.byte_cache import ByteCache
from k25_train.data.formats.records import MediaSegment
from k25_train.data.trajectories.rows import Trajectories
from k25_train.data.trajectories.step_file import (
    COLUMNS,
    FORMAT,
    FORMAT_VERSION,
    SMALL,
    checksum,
    segment_of,
)
from k25_train.errors import DataError

CACHED_BYTES = 2**26
"""What the trajectories that were read last may take. Our choice."""
_REMEDY = "restore it, or remove it and start again: the step is then made again"


class TokenColumns(NamedTuple):
    """What one trajectory of L tokens has of each; fields are those of `Trajectories`."""

    tokens: np.ndarray
    generated: np.ndarray
    rollout_logprobs: np.ndarray
    versions: np.ndarray
    advantages: np.ndarray
    policy_weights: np.ndarray
    ratio_weights: np.ndarray


class StepFile:
    """An open file of a step's trajectories. Safe across threads."""

    def __init__(self, path: Path) -> None:
        """Open it and check what describes its trajectories.

        Raises `DataError` for a file that is not there, cut short, damaged, or of another format.
        """
        self.path = path
        if not path.is_file():
            raise DataError(f"{path}: is not there: what the step trains on has not been rolled out")
        try:
            self._file = safe_open(path, framework="np")
            metadata = self._file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DataError(f"{path}: is no file of trajectories: {_REMEDY}")
            arrays = {name: self._file.get_tensor(name) for name in SMALL}
            text = metadata["described"]
            found = checksum([np.frombuffer(text.encode(), dtype=np.uint8), *arrays.values()])
            if f"{found:08x}" != metadata["crc32"]:
                raise DataError(f"{path}: is damaged (the CRC-32 of its description): {_REMEDY}")
            described = json.loads(text)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: cannot be read ({error}): {_REMEDY}") from error
        if described["version"] != FORMAT_VERSION:
            raise DataError(
                f"{path}: has format {described['version']}, but this version reads {FORMAT_VERSION}: go on "
                "with the code that wrote it"
            )
        self._columns = {name: self._file.get_slice(name) for name in COLUMNS}
        self._media = self._file.get_slice("media")
        self._segments: Sequence[Mapping[str, Any]] = described["media"]
        self.state: Mapping[str, Any] = described["state"]
        """Where the run is behind the step."""
        self.names: Sequence[str] = described["names"]
        """[R]: how messages call each trajectory."""
        self.facts: Sequence[Mapping[str, Any]] = described["facts"]
        """[R]: what else is known of each."""
        self.offsets, self.responses, self.num_generated, self._checksums = (
            arrays[name] for name in SMALL[:4]
        )
        self._media_of, self._media_of_offsets, self._media_offsets = (arrays[name] for name in SMALL[4:])
        self._read = ByteCache[TokenColumns](CACHED_BYTES, lambda rows: sum(each.nbytes for each in rows))

    @property
    def num_trajectories(self) -> int:
        """R."""
        return len(self.names)

    @property
    def lengths(self) -> np.ndarray:
        """[R] int64: tokens of each trajectory."""
        return np.diff(self.offsets)

    def rows(self, number: int) -> TokenColumns:
        """What one trajectory has of each token. Raises `DataError` if it is damaged."""
        return self._read.get(number, lambda: self._rows(number))

    def _rows(self, number: int) -> TokenColumns:
        first, end = self.offsets[number : number + 2].tolist()
        columns = {name: of[first:end] for name, of in self._columns.items()}
        if checksum(list(columns.values())) != self._checksums[number]:
            raise DataError(
                f"{self.path}: trajectory {self.names[number]} is damaged (its CRC-32): {_REMEDY}"
            )
        return TokenColumns(**{**columns, "generated": columns["generated"].view(np.bool_)})

    def segments(self, number: int) -> tuple[MediaSegment, ...]:
        """The images and videos of a trajectory, in the order of their placeholders."""
        first, end = self._media_of_offsets[number : number + 2].tolist()
        found = []
        for media in self._media_of[first:end].tolist():
            begin, stop = self._media_offsets[media : media + 2].tolist()
            found.append(segment_of(self.path.name, begin, stop - begin, self._segments[media]))
        return tuple(found)

    def read_media(self, offset: int, num_bytes: int) -> bytes:
        """Bytes of the files of all images and videos."""
        found: np.ndarray = self._media[offset : offset + num_bytes]
        return found.tobytes()

    def everything(self) -> Trajectories:
        """All trajectories, for whoever looks at a file."""
        of = [self.rows(number) for number in range(self.num_trajectories)]
        columns = {name: np.concatenate([getattr(rows, name) for rows in of]) for name in COLUMNS}
        media = [
            tuple(self.read_media(each.offset, each.num_bytes) for each in self.segments(number))
            for number in range(self.num_trajectories)
        ]
        return Trajectories(
            names=tuple(self.names),
            responses=self.responses,
            offsets=self.offsets,
            media=tuple(media),
            facts=tuple(self.facts),
            **columns,
        )

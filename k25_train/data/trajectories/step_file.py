"""The file of a step's trajectories: safetensors, written at once by one rank and read in parts by all.

Its columns lie end to end, so that a rank reads the trajectories of its own replica alone. What planning
needs of all of them is small: lengths, numbers of generated tokens, and sizes of images. Each trajectory and
each image has a checksum, and so has all that describes them. README.md has the table of its tensors.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from k25_train.data.decode.file_types import media_info, sniff
from k25_train.data.formats.index import bytes_crc32
from k25_train.data.formats.records import MediaSegment
from k25_train.data.mix.ragged import offsets_of
from k25_train.data.trajectories.checks import check_trajectories
from k25_train.data.trajectories.rows import Trajectories
from k25_train.errors import DataError

FORMAT = "k25-trajectories"
FORMAT_VERSION = 1
"""Of the files that are written; no other is read."""
COLUMNS = (
    "tokens", "generated", "rollout_logprobs", "versions", "advantages", "policy_weights", "ratio_weights",
)  # fmt: skip
"""What a trajectory has of each token, in the order in which its checksum goes over them."""
SMALL = (
    "offsets",
    "responses",
    "num_generated",
    "checksums",
    "media_of",
    "media_of_offsets",
    "media_offsets",
)
"""What planning reads whole, in the order in which the checksum goes over them; int64 each."""


def step_path(folder: Path, step: int) -> Path:
    """The file of an optimizer step, counted from 1."""
    return folder / f"step_{step}.safetensors"


def write_step_file(path: Path, rows: Trajectories, state: Mapping[str, Any]) -> None:
    """Write the trajectories of a step; the file is there whole or not at all.

    Args:
        path: of the file; its folder is made.
        rows: with their weights.
        state: where the run is behind the step, as JSON has it: what a checkpoint of the step keeps.

    Raises `DataError`, naming the trajectory, for what cannot be trained (`checks.py`), an image that is none
    and facts that JSON has no words for; `OSError` if it cannot be written.
    """
    check_trajectories(rows)
    files: dict[bytes, int] = {}
    segments: list[dict[str, Any]] = []
    for name, media in zip(rows.names, rows.media, strict=True):
        for data in media:
            # Responses to one prompt have its images in common.
            if data not in files:
                files[data] = len(files)
                segments.append(_sizes_of(name, data))
    columns = {name: np.ascontiguousarray(getattr(rows, name)) for name in COLUMNS}
    columns["generated"] = columns["generated"].view(np.uint8)
    small = {
        "offsets": rows.offsets,
        "responses": rows.responses,
        "num_generated": np.add.reduceat(rows.generated.astype(np.int64), rows.offsets[:-1]),
        "checksums": np.array(
            [checksum([of[a:b] for of in columns.values()]) for a, b in _spans(rows.offsets)], dtype=np.int64
        ),
        "media_of": np.array([files[data] for media in rows.media for data in media], dtype=np.int64),
        "media_of_offsets": offsets_of(np.array([len(media) for media in rows.media], dtype=np.int64)),
        "media_offsets": offsets_of(np.array([len(data) for data in files], dtype=np.int64)),
    }
    text = _description(rows, state, segments)
    tensors = {**columns, **small, "media": np.frombuffer(b"".join(files), dtype=np.uint8)}
    described = checksum([np.frombuffer(text.encode(), dtype=np.uint8), *(small[name] for name in SMALL)])
    _write(path, tensors, {"format": FORMAT, "described": text, "crc32": f"{described:08x}"})


def checksum(arrays: list[np.ndarray]) -> int:
    """CRC-32 over arrays, one after another."""
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), found)
    return found


def _spans(offsets: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


def _sizes_of(name: str, data: bytes) -> dict[str, Any]:
    """What planning knows of an image or video. Raises `DataError` with the name of its trajectory."""
    try:
        media_type, file_format = sniff(data, "")
        info = asdict(media_info(data, media_type, file_format))
    except DataError as error:
        raise DataError(f"an image of trajectory {name} {error}") from error
    return {"type": media_type, "format": file_format, **info, "crc32": bytes_crc32(data)}


def segment_of(shard: str, offset: int, num_bytes: int, sizes: Mapping[str, Any]) -> MediaSegment:
    """A file of `media`, as the decoders know it."""
    return MediaSegment(shard=shard, offset=offset, num_bytes=num_bytes, **sizes)


def _description(rows: Trajectories, state: Mapping[str, Any], segments: list[dict[str, Any]]) -> str:
    for name, facts in zip(rows.names, rows.facts, strict=True):
        try:
            json.dumps(dict(facts), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"facts of trajectory {name} are nothing that JSON can hold: {error}") from error
    described = {
        "version": FORMAT_VERSION,
        "state": dict(state),
        "names": list(rows.names),
        "facts": [dict(facts) for facts in rows.facts],
        "media": segments,
    }
    return json.dumps(described, allow_nan=False)


def _write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), scratch, dict(metadata))
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

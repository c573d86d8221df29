"""The manifest of a checkpoint: its files with checksums, whether it is sound, the losses and data behind it.

`manifest.json` is written last. It has a checksum of its own text, so that one changed by a disk or by hand
is not taken for what the ranks wrote. That protects against accidents, not against who can compute SHA-256.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from k25_train.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
"""1 has the files' sizes alone: neither checksums, nor soundness, nor facts of the data."""
_OWN_CHECKSUM = "sha256_of_the_rest"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint as it was when it was written."""

    num_bytes: int
    """Its size."""
    sha256: str
    """Hexadecimal hash of its content; empty if it was written in format 1. Takes 0.6 s per GB on a core with
    SHA instructions: 2 s for the 3.4 GB that each of 4,096 ranks writes of 14 TB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Steps that were done."""
    files: Mapping[str, FileEntry]
    """Path relative to the folder -> file; all but the manifest."""
    why_unsound: str = ""
    """What was wrong with the last step or its outcome; empty for a sound checkpoint."""
    facts: Mapping[str, str]
    """Dotted key -> what is true of the data that it was trained on (`k25_train/data/fingerprint.py`)."""
    losses: Sequence[float] = ()
    """Of the last sound steps, in nats per token, which those of a resumed run are compared with."""
    version: int = FORMAT_VERSION
    """Of the format that it was read from."""

    @property
    def is_sound(self) -> bool:
        """Whether a run may resume from it by itself."""
        return not self.why_unsound

    @property
    def has_checksums(self) -> bool:
        """Whether the content of its files can be checked, not their sizes alone."""
        return all(file.sha256 for file in self.files.values())

    def to_text(self) -> str:
        """As it is written, in the current format."""
        values = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "sound": self.is_sound,
            "why_unsound": self.why_unsound,
            "facts": dict(self.facts),
            "losses": list(self.losses),
            "files": {
                name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in self.files.items()
            },
        }
        return json.dumps(values | {_OWN_CHECKSUM: _checksum(values)}, indent=1)

    @staticmethod
    def from_text(text: str) -> "Manifest":
        """Read either format. Raises ValueError that says what is wrong."""
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(version := values.get("format_version"), int):
            raise ValueError("it has no format_version")  # noqa: TRY004
        if not 1 <= version <= FORMAT_VERSION:
            raise ValueError(f"it has format {version}, but this version reads 1 to {FORMAT_VERSION}")
        if version == 1:
            sizes = _member(values, "file_bytes", dict)
            files = {_path(name): FileEntry(_number(size), "") for name, size in sizes.items()}
            return Manifest(step=_number(values.get("step")), files=files, facts={}, version=1)
        if values.pop(_OWN_CHECKSUM, None) != _checksum(values):
            raise ValueError("it was changed since it was written")
        files = {
            _path(name): FileEntry(_number(file["bytes"]), file["sha256"])
            for name, file in _member(values, "files", dict).items()
        }
        return Manifest(
            step=_number(values.get("step")),
            files=files,
            why_unsound=_member(values, "why_unsound", str),
            facts=_member(values, "facts", dict),
            losses=[_loss(loss) for loss in values.get("losses", [])],
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises `CheckpointError` if it is missing, unreadable, changed, or of a later format.
    """
    try:
        return Manifest.from_text((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: missing or unreadable ({error})") from error


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _member(values: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(value := values.get(key), kind):
        raise ValueError(f"{key} is {value!r} and not a {kind.__name__}")  # noqa: TRY004
    return value


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _loss(value: object) -> float:
    """A loss that others can be compared with: no other is written, and NaN would condemn all that follow."""
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a loss")
    return value


def _path(name: str) -> str:
    """A name that stays in the folder: a foreign manifest must not make us read elsewhere."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is not a file of the checkpoint")
    return name

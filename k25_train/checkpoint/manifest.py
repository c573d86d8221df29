"""The manifest of a checkpoint: its files with checksums, whether it is sound, the losses and data behind it.

`manifest.json` is written last. It has a checksum of its own text, so that one changed by a disk or by hand
is not taken for what the ranks wrote. That protects against accidents, not against who can compute SHA-256.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from k25_train.checkpoint.storage.kinds import MANIFEST, Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.errors import CheckpointError

FORMAT_VERSION = 3
"""1 has the files' sizes alone: neither checksums, nor soundness, nor facts of the data. 2 has torch's files
(`.distcp`) with a SHA-256 each. 3 has files of parts (`checkpoint/files`), its kind and layout."""
_OWN_CHECKSUM = "sha256_of_the_rest"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint as it was when it was written."""

    num_bytes: int
    """Its size."""
    sha256: str = ""
    """Hexadecimal hash of its content; empty for a file of parts, and for any that format 1 wrote."""
    header_xxh3: str = ""
    """Hexadecimal xxh3_64 of the header of a file of parts, its length included; empty for other files."""
    table_xxh3: str = ""
    """And of its table of checksums, which vouches for the data block by block."""

    @property
    def has_parts(self) -> bool:
        """Whether it is a file of parts (`checkpoint/files`)."""
        return bool(self.header_xxh3)

    @property
    def has_checksums(self) -> bool:
        """Whether its content can be checked."""
        return bool(self.sha256 or self.table_xxh3)

    def to_values(self) -> dict[str, Any]:
        """As it is written."""
        hashes = {"sha256": self.sha256, "header_xxh3": self.header_xxh3, "table_xxh3": self.table_xxh3}
        return {"bytes": self.num_bytes} | {name: value for name, value in hashes.items() if value}

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> "FileEntry":
        """Read it back. Raises ValueError or KeyError."""
        hashes = {name: _text(value) for name, value in values.items() if name != "bytes"}
        unknown = hashes.keys() - {"sha256", "header_xxh3", "table_xxh3"}
        if unknown or ("header_xxh3" in hashes) != ("table_xxh3" in hashes) or not any(hashes.values()):
            raise ValueError(f"a file has the checksums {sorted(hashes)}")
        return FileEntry(_number(values["bytes"]), **hashes)


class Kind(StrEnum):
    """What a checkpoint holds."""

    RUN = "run"
    """A run to go on with: weights, masters, moments, position in the data."""
    WEIGHTS = "weights"
    """Weights alone, to begin a run from: an import."""


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
    number: int = 0
    """Which sound checkpoint of its run it is, from 1 on, as `checkpoint.keep_every` counts them; 0 before
    format 3."""
    kind: Kind = Kind.RUN
    """What it holds."""
    layout: Mapping[str, int | str] = field(default_factory=dict)
    """What wrote it: pp, vpp, ep, cp, dp, world_size, dep (mode). Loading asks for none of it; people do.
    Empty before format 3."""
    num_updates: int | None = None
    """Steps that the optimizers count, which skipped steps are not among; None before format 3, where it is
    among the tensors."""
    version: int = FORMAT_VERSION
    """Of the format that it was read from."""

    @property
    def is_sound(self) -> bool:
        """Whether a run may resume from it by itself."""
        return not self.why_unsound

    @property
    def has_checksums(self) -> bool:
        """Whether the content of its files can be checked, not their sizes alone."""
        return all(file.has_checksums for file in self.files.values())

    @property
    def part_files(self) -> dict[str, FileEntry]:
        """The files of parts among its files, by name."""
        return {name: file for name, file in sorted(self.files.items()) if file.has_parts}

    def to_text(self) -> str:
        """As it is written, in the current format."""
        values = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "sound": self.is_sound,
            "why_unsound": self.why_unsound,
            "facts": dict(self.facts),
            "losses": list(self.losses),
            "number": self.number,
            "kind": str(self.kind),
            "layout": dict(self.layout),
            "num_updates": self.num_updates,
            "files": {name: file.to_values() for name, file in self.files.items()},
        }
        return json.dumps(values | {_OWN_CHECKSUM: _checksum(values)}, indent=1)

    @staticmethod
    def from_text(text: str) -> "Manifest":
        """Read any format. Raises ValueError that says what is wrong."""
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(version := values.get("format_version"), int):
            raise ValueError("it has no format_version")  # noqa: TRY004
        if not 1 <= version <= FORMAT_VERSION:
            raise ValueError(f"it has format {version}, but this version reads 1 to {FORMAT_VERSION}")
        if version == 1:
            sizes = _member(values, "file_bytes", dict)
            files = {_path(name): FileEntry(_number(size)) for name, size in sizes.items()}
            return Manifest(step=_number(values.get("step")), files=files, facts={}, version=1)
        if values.pop(_OWN_CHECKSUM, None) != _checksum(values):
            raise ValueError("it was changed since it was written")
        files = {
            _path(name): FileEntry.from_values(file) for name, file in _member(values, "files", dict).items()
        }
        num_updates = values.get("num_updates")
        return Manifest(
            step=_number(values.get("step")),
            files=files,
            why_unsound=_member(values, "why_unsound", str),
            facts=_member(values, "facts", dict),
            losses=[_loss(loss) for loss in values.get("losses", [])],
            number=_number(values.get("number", 0)),
            kind=Kind(values.get("kind", Kind.RUN)),
            layout=_member(values, "layout", dict) if version > 2 else {},
            num_updates=None if num_updates is None else _number(num_updates),
            version=version,
        )


def read_manifest(folder: Place) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises `CheckpointError` if it is missing, unreadable, changed, or of a later format.
    """
    try:
        return Manifest.from_text(storage_of(folder).read(folder / MANIFEST))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: missing or unreadable ({error})") from error


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _member(values: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(value := values.get(key), kind):
        raise ValueError(f"{key} is {value!r} and not a {kind.__name__}")  # noqa: TRY004
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")  # noqa: TRY004
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

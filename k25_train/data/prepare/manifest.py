"""What a preparation is of, on disk: its plan while it works, and a record of the whole when it is done.

OUT.prepare/plan.json   inputs, tokenizer and rules; a command with others may not go on from it
OUT.prepare/parts/      units that are done
OUT-00000.bin, .idx     tokens and index of a shard, as megatron-core reads them
OUT-00000.json          the shard's facts, which `k25-data index` reads; the last file of a shard
OUT.json                the whole: the plan, counts, and what was skipped
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_train.data.prepare.inputs import InputFile
from k25_train.errors import DataError

FORMAT_VERSION = 1
FOLDER_NAME = "text"
"""Name of the shards if `--out` is a folder."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where the results are."""

    folder: Path
    name: str

    @classmethod
    def of(cls, out: str) -> "Output":
        """A prefix, or a folder that exists or ends with a slash. Raises DataError for a URL."""
        if "://" in out or "\0" in out or not out:
            raise DataError(
                f"--out={out!r}: must be a local path. Prepare to a local disk, then copy the files to where "
                "the training reads them."
            )
        path = Path(os.path.abspath(os.path.expanduser(out)))
        if out.endswith("/") or path.is_dir():
            return cls(path, FOLDER_NAME)
        return cls(path.parent, path.name)

    @property
    def prefix(self) -> Path:
        """Beginning of all names."""
        return self.folder / self.name

    @property
    def work(self) -> Path:
        """Folder of what is not done."""
        return self.folder / f"{self.name}.prepare"

    @property
    def plan(self) -> Path:
        """What the work folder is of."""
        return self.work / "plan.json"

    @property
    def whole(self) -> Path:
        """The record of a result that is complete."""
        return self.folder / f"{self.name}.json"

    def shard(self, number: int) -> Path:
        """Prefix of a shard's files."""
        return self.folder / f"{self.name}-{number:05d}"

    def shards(self) -> list[Path]:
        """Files of shards that are there."""
        found = sorted(self.folder.glob("*.*")) if self.folder.is_dir() else []
        return [path for path in found if self.number_of(path) >= 0]

    def number_of(self, path: Path) -> int:
        """Number of the shard that a file is of; -1 if it is of none."""
        path = path.with_suffix("") if path.suffix == ".partial" else path
        number = path.stem.removeprefix(f"{self.name}-")
        is_ours = path.suffix in (".bin", ".idx", ".json") and number != path.stem and number.isdecimal()
        return int(number) if is_ours else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that the bytes of the result depend on."""

    inputs: Sequence[InputFile]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    field: str
    id_field: str
    append_eod: bool
    eod: int
    shard_tokens: int
    unit_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As plain values; the tokenizer's place is a note, not part of what it is."""
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer_sha256": self.tokenizer_sha256,
            "vocab_size": self.vocab_size,
            "field": self.field,
            "id_field": self.id_field,
            "ends_with_eod": self.append_eod,
            "eod": self.eod,
            "shard_tokens": self.shard_tokens,
            "unit_bytes": self.unit_bytes,
            "inputs": [file.to_json() for file in self.inputs],
        }


OPTIONS = {
    "tokenizer_sha256": "--tokenizer is another file",
    "vocab_size": "--tokenizer has another vocabulary",
    "field": "--field",
    "id_field": "--id-field",
    "ends_with_eod": "--append-eod",
    "shard_tokens": "--shard-tokens",
    "unit_bytes": "--unit-bytes",
    "format_version": "version of this command",
    "inputs": "inputs",
}
"""Entry of a plan -> how the user knows it."""


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How two plans differ, in words; empty if they do not."""
    found = []
    for key, name in OPTIONS.items():
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "inputs":
            found.append(_inputs_difference(old or [], new or []))
        elif key == "tokenizer_sha256":
            found.append(f"{name} (SHA-256 {str(new)[:12]}…, there {str(old)[:12]}…)")
        else:
            found.append(f"{name} is {new!r}, there {old!r}")
    return "; ".join(found)


def _inputs_difference(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    old, new = ({file["url"]: file for file in files} for files in (before, now))
    for url in new:
        if url not in old:
            return f"{url} is not one of the {len(old)} inputs there"
    for url in old:
        if url not in new:
            return f"{url} is an input there"
    changed = [url for url in new if dict(new[url]) != dict(old[url])]
    if changed:
        return f"{changed[0]} has changed since ({len(changed)} of {len(new)} inputs have)"
    return "inputs are in another order"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of ours; None without the file. Raises DataError if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(
            f"{path}: is damaged ({error}). Start over with --restart, or choose another --out."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is no record of a preparation. Choose another --out.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of ours, whole or not at all."""
    scratch = path.with_name(f"{path.name}.partial")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)

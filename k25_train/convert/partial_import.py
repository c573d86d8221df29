"""The folder of an import that is not complete, `OUT.partial`: what is done, and the commit.

Nodes meet in this folder alone. A unit is done when its record is there, which is written after its file; so
a kill loses the units that were being written. Whoever finds all records writes the manifest and renames the
folder; if two do so at once, they write the same, and the second finds the first one's result.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k25_train.checkpoint.files.header import LENGTH_BYTES, digest_of, header_length, parse
from k25_train.checkpoint.integrity import entry_of
from k25_train.checkpoint.manifest import FileEntry, Kind, Manifest, read_manifest
from k25_train.checkpoint.storage.kinds import MANIFEST, PARTIAL
from k25_train.checkpoint.storage.places import POSIX
from k25_train.checkpoint.storage.posix import sync_folder
from k25_train.convert.units import Unit
from k25_train.errors import CheckpointError

IDENTITY = "import.json"
"""What the import is of; another must not go on in its folder."""
_DONE = "done"
FINGERPRINT = "import.fingerprint"
"""Fact in the manifest by which a command knows that its result is there."""


class PartialImport:
    """An import's folder, as one node sees it."""

    def __init__(self, out: Path, identity: Mapping[str, str]) -> None:
        self.out = out
        """Where the result goes."""
        self.folder = out.with_name(out.name + PARTIAL)
        """Where it is until then."""
        self._identity = dict(identity)

    def is_complete(self) -> bool:
        """Whether the result is there. Raises CheckpointError if something else is."""
        if not os.path.lexists(self.out):
            return False
        try:
            facts = read_manifest(self.out).facts
        except CheckpointError:
            facts = {}
        if facts.get(FINGERPRINT) != self._identity[FINGERPRINT]:
            raise CheckpointError(f"{self.out}: is there already, and not of this import: choose another OUT")
        return True

    def begin(self, *, restart: bool) -> None:
        """Make the folder, or go on in it. Raises CheckpointError if it is another import's."""
        if restart and self.folder.exists():
            shutil.rmtree(self.folder)
        (self.folder / _DONE).mkdir(parents=True, exist_ok=True)
        path, scratch = self.folder / IDENTITY, self.folder / f"{IDENTITY}.{_me()}"
        POSIX.write(scratch, json.dumps(self._identity, indent=1))
        try:
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
        finally:
            scratch.unlink()
        found = _read(path)
        # The folder may be mounted elsewhere.
        compared = self._identity.keys() - {"source"}
        changed = [key for key in sorted(compared) if found.get(key) != self._identity[key]]
        if changed:
            lines = [f"  {key}: {found.get(key)} then, {self._identity[key]} now" for key in changed]
            raise CheckpointError(
                "\n".join([f"{self.folder}: belongs to another import:", *lines])
                + "\n  -> give that import's command again, choose another OUT, or replace it by --restart"
            )
        for left_over in self.folder.glob(f"*.safetensors.{os.uname().nodename}.*"):
            if not _is_alive(int(left_over.suffix.removeprefix("."))):
                left_over.unlink(missing_ok=True)

    def done(self, units: Sequence[Unit]) -> dict[int, FileEntry]:
        """Units whose files have the headers and tables that were written; others are forgotten."""
        entries = {}
        for unit in units:
            record = self.folder / _DONE / f"{unit.number:05d}.json"
            if not record.exists():
                continue
            try:
                entry = FileEntry.from_values(_read(record))
                _check(self.folder / unit.file_name, entry)
            except (OSError, ValueError, KeyError, CheckpointError):
                record.unlink(missing_ok=True)
                continue
            entries[unit.number] = entry
        return entries

    def all_done(self, units: Sequence[Unit]) -> bool:
        """Whether every unit of every node has its record."""
        return all((self.folder / _DONE / f"{unit.number:05d}.json").exists() for unit in units)

    def record(self, unit: Unit, entry: FileEntry) -> None:
        """Note that a unit is done."""
        POSIX.replace(self.folder / _DONE / f"{unit.number:05d}.json", json.dumps(entry.to_values()))

    def commit(self, units: Sequence[Unit], texts: Mapping[str, str], facts: Mapping[str, str]) -> bool:
        """Make the result of complete parts; False if another node has done so.

        Raises CheckpointError if a file is not as it was written.
        """
        try:
            self._publish(units, texts, facts)
        except (OSError, CheckpointError):
            if not self.folder.exists() and self.is_complete():
                return False
            raise
        sync_folder(self.out.parent)
        self.clean_up()
        return True

    def _publish(self, units: Sequence[Unit], texts: Mapping[str, str], facts: Mapping[str, str]) -> None:
        entries = self.done(units)
        if lost := [unit.file_name for unit in units if unit.number not in entries]:
            raise CheckpointError(f"{self.folder}: {lost[0]} is damaged; give the command again")
        files = {unit.file_name: entries[unit.number] for unit in units}
        for name, text in texts.items():
            POSIX.replace(self.folder / name, text)
            files[name] = entry_of(self.folder / name)
        manifest = Manifest(step=0, files=files, facts=dict(facts), kind=Kind.WEIGHTS, num_updates=0)
        POSIX.replace(self.folder / MANIFEST, manifest.to_text())
        sync_folder(self.folder)
        os.rename(self.folder, self.out)

    def clean_up(self) -> None:
        """Remove what a complete import does not need."""
        shutil.rmtree(self.out / _DONE, ignore_errors=True)
        for left_over in (self.out / IDENTITY, *self.out.glob("*.safetensors.*")):
            left_over.unlink(missing_ok=True)


def _check(path: Path, entry: FileEntry) -> None:
    """Compare header and table of a file with what was written: they vouch for its data when these are read.

    Raises ValueError, OSError.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(LENGTH_BYTES)
        start += file.read(header_length(start, size) - LENGTH_BYTES)
        header = parse(start, size)
        file.seek(header.table_offset)
        table = file.read(header.table_bytes)
    if (size, digest_of(start), digest_of(table)) != (entry.num_bytes, entry.header_xxh3, entry.table_xxh3):
        raise ValueError(f"{path.name} is not as it was written")


def _me() -> str:
    return f"{os.uname().nodename}.{os.getpid()}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); start again with --restart") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is no JSON object; start again with --restart")
    return values

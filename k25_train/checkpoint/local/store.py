"""The checkpoints on one node's disk: `<checkpoint.local_dir>/<run>/node_<N>/step_<N>/`.

Each has the files of the ranks of this node alone, in the form of a shared one, its own manifest with
configuration and position in the data, and `local.json`: which save it is of, on which ranks. It is of use to
these very ranks alone, in this very layout. At most the newest two stay. Needs no torch.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k25_train.checkpoint import folders
from k25_train.checkpoint.heads import changed_heads
from k25_train.checkpoint.local.choice import Candidate
from k25_train.checkpoint.manifest import FileEntry, Manifest, read_manifest
from k25_train.checkpoint.publish import publish
from k25_train.checkpoint.storage.kinds import MANIFEST, Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.errors import CheckpointError

LOCAL = "local.json"
"""Which save a checkpoint on a node's disk is of."""
RUN_ID = "run_id"
"""A file of the run folder: a text that no other run has, not even a later one in a folder of this name."""
KEEP = 2
"""Checkpoints that stay on a node: the newest, and the one before it, which all nodes have if the newest was
interrupted on some."""
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What must be as it was for these files to be of use."""

    save: str
    """Which save it is of, the same on all nodes."""
    after: str
    """The newest shared checkpoint when it was written."""
    layout: Mapping[str, Any]
    """pp, vpp, ep, dp, world_size, DEP mode and layers of stages of the ranks that wrote it."""
    ranks: Sequence[int]
    """Those of this node."""

    def to_text(self) -> str:
        """As it is written."""
        values = asdict(self) | {"layout": dict(self.layout), "ranks": list(self.ranks)}
        return json.dumps({"format_version": FORMAT_VERSION, **values})

    @staticmethod
    def from_text(text: str) -> "Origin":
        """Read it back. Raises ValueError, KeyError or TypeError for what no run writes."""
        values = json.loads(text)
        if values.pop("format_version") != FORMAT_VERSION:
            raise ValueError("it is of another format")
        return Origin(**values)


class LocalStore:
    """The checkpoints of one run on one node. Its ranks share it; the first of them changes it."""

    def __init__(self, local_dir: str, run_id: str, node: int, ranks: Sequence[int]) -> None:
        """
        Args:
            local_dir: `checkpoint.local_dir`.
            run_id: of the run (`identity_of_run`).
            node: number of the node in the job.
            ranks: of the node.
        """
        self.root = Path(local_dir) / run_id / f"node_{node}"
        self.ranks = tuple(ranks)

    def prepare(self, step: int) -> Path:
        """An empty folder for the files of a step. Raises `CheckpointError` if the disk refuses."""
        try:
            for left_over in storage_of(self.root).left_overs(self.root):
                storage_of(self.root).remove(left_over)
            return Path(str(folders.prepare_partial(self.root, step)))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint.local_dir: {self.root} cannot be written ({error}): make room or name another "
                "folder; null for none"
            ) from error

    def partial(self, step: int) -> Path:
        """Where the files of a step are written: what `prepare` returns, which one rank calls."""
        return self.root / f"step_{step}.partial"

    def commit(self, manifest: Manifest, texts: Mapping[str, str], origin: Origin) -> Path:
        """Give written files their name, at once, and drop what is older than the one before, or of steps
        that this course of the run has not come to.

        Raises `CheckpointError` or OSError; earlier ones stay as they were.
        """
        final = folders.step_folder(self.root, manifest.step)
        if final.exists():
            storage_of(self.root).discard(final)
        placed = publish(self.root, self.partial(manifest.step), manifest, {**texts, LOCAL: origin.to_text()})
        steps = [folders.step_of(each) for each in folders.list_checkpoints(self.root)]
        kept = sorted(step for step in steps if step <= manifest.step)[-KEEP:]
        self.forget([step for step in steps if step not in kept])
        return Path(str(placed))

    def forget(self, steps: Collection[int]) -> None:
        """Delete the checkpoints of steps; what is not there is no error."""
        for step in steps:
            folder = folders.step_folder(self.root, step)
            if folder.exists():
                storage_of(self.root).discard(folder)

    def forget_all(self) -> None:
        """Delete all of them: the run is complete, or what they hold is."""
        self.forget([folders.step_of(each) for each in folders.list_checkpoints(self.root)])

    def candidates(self, rank: int, layout: Mapping[str, Any]) -> list[Candidate]:
        """Those that are whole as far as they are of `rank`, and of the layout as it is now.

        What is not is passed over: the shared checkpoint is there. Sizes and heads are compared; every block
        is when it is read.
        """
        found = []
        for folder in folders.list_checkpoints(self.root):
            try:
                manifest = read_manifest(folder)
                origin = Origin.from_text((folder / LOCAL).read_text(encoding="utf-8"))
                own = files_of(manifest, rank)
            except (CheckpointError, OSError, ValueError, KeyError, TypeError):
                continue
            is_of_these = dict(origin.layout) == dict(layout) and tuple(origin.ranks) == self.ranks
            # A rank that holds nothing has no file, and the manifest, which has a checksum, says so.
            if is_of_these and manifest.is_sound and not changed_heads(folder, own):
                found.append(Candidate(manifest.step, origin.save, origin.after))
        return found

    def folder(self, candidate: Candidate) -> Path:
        """Where a candidate is on this node."""
        return Path(str(folders.step_folder(self.root, candidate.step)))


def files_of(manifest: Manifest, rank: int) -> dict[str, FileEntry]:
    """The files that one rank wrote."""
    start = f"rank_{rank:05d}_"
    return {name: entry for name, entry in manifest.part_files.items() if name.startswith(start)}


def identity_of(shared: Place | None) -> str:
    """What no other checkpoint has in common with a shared one: its name and a hash of its manifest."""
    if shared is None:
        return ""
    try:
        text = (shared / MANIFEST).read_bytes()
    except OSError:
        return shared.name
    return f"{shared.name} {hashlib.sha256(text).hexdigest()[:16]}"


def identity_of_run(run_folder: Path) -> str:
    """The run's own id, which is made when it is asked for first.

    Raises `CheckpointError` if it can neither be read nor written.
    """
    path = run_folder / RUN_ID
    try:
        if not path.exists():
            scratch = path.with_name(f".{RUN_ID}.{secrets.token_hex(4)}")
            scratch.write_text(f"{run_folder.absolute().name}-{secrets.token_hex(8)}\n", encoding="utf-8")
            os.replace(scratch, path)
        found = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CheckpointError(f"{path}: can neither be read nor written ({error})") from error
    if not found or "/" in found or found.startswith("."):
        raise CheckpointError(f"{path}: holds {found[:80]!r}, which is no id of a run: remove the file")
    return found

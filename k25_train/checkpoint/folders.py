"""Checkpoint folders: which are complete, how one becomes complete, and which may go.

`checkpoints/step_<N>/` holds what the ranks wrote, `config.yaml`, and `manifest.json` with the size of every
file. A checkpoint is written into `step_<N>.partial` and renamed when its manifest is on disk; one that has
to go is renamed back before it is deleted. So a folder with the final name is whole, whatever happened to the
job, and a `.partial` is never read.
"""

import json
import os
import re
import shutil
from pathlib import Path

from k25_train.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
"""The configuration that the run had when it saved."""
PARTIAL = ".partial"
_STEP = re.compile(r"^step_(\d+)$")


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs."""
    return root / f"step_{step}"


def partial_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is complete."""
    return root / f"step_{step}{PARTIAL}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name. Raises `CheckpointError` for another name."""
    match = _STEP.match(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not a checkpoint: its name must be step_<N>")
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, oldest step first; empty if there is no such folder."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir() and _STEP.match(path.name)), key=step_of)


def newest_checkpoint(root: Path) -> Path | None:
    """The folder to resume from, or None. It is not verified yet."""
    folders = list_checkpoints(root)
    return folders[-1] if folders else None


def start_from(root: Path) -> Path | None:
    """The folder to resume from, or None, after deleting what interrupted saves and deletions left behind.

    Only for the start of a run, while no rank is saving.
    """
    for folder in root.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)
    return newest_checkpoint(root)


def prepare_partial(root: Path, step: int) -> Path:
    """Create an empty folder to write `step` into; a left-over of an interrupted save is dropped."""
    folder = partial_folder(root, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(root: Path, step: int, config_yaml: str) -> Path:
    """Give the written checkpoint its configuration, its manifest and its final name."""
    partial, final = partial_folder(root, step), step_folder(root, step)
    _write_durably(partial / CONFIG, config_yaml)
    sizes = {
        str(path.relative_to(partial)): path.stat().st_size
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    manifest = {"format_version": FORMAT_VERSION, "step": step, "file_bytes": sizes}
    _write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
    return partial.rename(final)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path) -> int:
    """Check that a checkpoint is whole and return its step.

    Raises `CheckpointError` naming the first file that is missing, cut short or unknown to the manifest's
    format, and what to do.
    """
    others = [path.name for path in list_checkpoints(folder.parent) if path != folder]
    remedy = f"restore {folder} from a copy, or delete it to " + (
        f"resume from {others[-1]}" if others else "start from scratch"
    )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such checkpoint; {folder.parent} holds {', '.join(others) or 'none'}"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes, version = manifest["file_bytes"], manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: missing or unreadable ({error}); {remedy}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder}: format {version}, but this version reads {FORMAT_VERSION}")
    for name, expected in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise CheckpointError(f"{path} {state}: the checkpoint is incomplete; {remedy}")
    return int(manifest["step"])


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, oldest first."""
    for folder in list_checkpoints(root)[:-keep]:
        doomed = folder.rename(folder.with_name(folder.name + PARTIAL))
        shutil.rmtree(doomed, ignore_errors=True)

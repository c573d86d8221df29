"""Checkpoint folders: their names, which of them count, and which may go.

`checkpoints/step_<N>/` is a complete checkpoint, `step_<N>.partial` one that is being written or deleted, and
`step_<N>.unsound` one whose last step went wrong: kept aside to be looked at, never resumed from by itself,
and never counted in `checkpoint.keep`. A folder gets its final name when all of it is on disk, so whatever
happens to the job, a folder with the final name is whole, and a `.partial` is never read. Any of them may be
a symbolic link to a folder elsewhere: a link that has to go is removed, and what it points to stays.

Needs no torch.
"""

import errno
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from k25_train.checkpoint.manifest import MANIFEST, read_manifest
from k25_train.errors import CheckpointError, DamagedCheckpointError

CONFIG = "config.yaml"
"""The configuration that the run had when it saved."""
DATA_STATE = "data_state.json"
"""How far its data had been read then (`data_state.py`)."""
PARTIAL = ".partial"
UNSOUND = ".unsound"
PROVEN = "proven"
"""An empty file in a checkpoint from whose weights a sound step was taken: it is never set aside later."""
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")


def step_folder(root: Path, step: int) -> Path:
    """Where the sound checkpoint of `step` belongs."""
    return root / f"step_{step}"


def partial_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is complete."""
    return root / f"step_{step}{PARTIAL}"


def unsound_folder(root: Path, step: int) -> Path:
    """Where a checkpoint of `step` is set aside."""
    return root / f"step_{step}{UNSOUND}"


def has_step_name(folder: Path) -> bool:
    """Whether a folder is called as a checkpoint in a run folder is, sound or not."""
    return _STEP.fullmatch(folder.name.removesuffix(UNSOUND)) is not None


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint, sound or not. Raises `CheckpointError` for another name."""
    match = _STEP.fullmatch(folder.name.removesuffix(UNSOUND))
    if match is None:
        raise CheckpointError(f"{folder} is not a checkpoint: its name must be step_<N>")
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Folders, or links to some, with the name of a complete checkpoint, oldest step first."""
    return _named(root, "")


def sound_checkpoints(root: Path) -> list[Path]:
    """Of those, the ones that do not say that they are unsound, oldest step first.

    One whose manifest cannot be read is among them: a damaged checkpoint must not be passed over in silence.
    """
    return [folder for folder in list_checkpoints(root) if why_unsound(folder) == ""]


def unsound_checkpoints(root: Path) -> list[Path]:
    """Checkpoints that were set aside, and those that say so under another name, oldest step first."""
    found = [folder for folder in list_checkpoints(root) if why_unsound(folder) != ""]
    return sorted([*found, *_named(root, UNSOUND)], key=step_of)


def newest_checkpoint(root: Path, *, accept_unsound: bool = False) -> Path | None:
    """The checkpoint to resume from, or None. It is not verified yet."""
    found = sound_checkpoints(root)
    if accept_unsound:
        found = sorted([*unsound_checkpoints(root), *found], key=step_of)
    return found[-1] if found else None


def why_unsound(folder: Path) -> str:
    """What a complete checkpoint says to be wrong with it; empty if it is sound, or says nothing readable."""
    try:
        return read_manifest(folder).why_unsound
    except CheckpointError:
        return ""


def is_whole(folder: Path) -> bool:
    """Whether the manifest is readable and every file has its size."""
    try:
        files = read_manifest(folder).files
    except CheckpointError:
        return False
    # There are thousands, each a request to the file system.
    with ThreadPoolExecutor(16) as pool:
        sizes = pool.map(lambda name: size_of(folder / name), files)
        return all(size == file.num_bytes for size, file in zip(sizes, files.values(), strict=True))


def size_of(path: Path) -> int | None:
    """Bytes of a file, or None if there is none that can be seen."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def start_from(root: Path, *, accept_unsound: bool = False) -> Path | None:
    """The checkpoint to resume from, or None, after deleting what interrupted saves and deletions left.

    Only for the start of a run, while no rank is saving. Raises `CheckpointError` if the folder cannot be
    read, if the newest checkpoint is a link that leads nowhere, or if all checkpoints are unsound ones.
    """
    try:
        for suffix in (PARTIAL, UNSOUND + PARTIAL):
            for left_over in _named(root, suffix, folders_only=False):
                remove(left_over)
        newest = newest_checkpoint(root, accept_unsound=accept_unsound)
        links = [each for each in _named(root, "", folders_only=False) if _leads_nowhere(each)]
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read ({error}); see that all ranks may read it") from error
    if links and (newest is None or step_of(links[-1]) > step_of(newest)):
        older = f"resume from {newest.name}" if newest else "start from scratch"
        raise DamagedCheckpointError(
            f"{links[-1]} is a link to {os.readlink(links[-1])}, where no folder is: bring that back, or "
            f"remove the link to {older}",
            links[-1],
            newest,
        )
    if newest is None and (unsound := unsound_checkpoints(root)):
        reasons = "; ".join(f"{each.name} ({why_unsound(each) or 'set aside'})" for each in unsound)
        raise CheckpointError(
            f"{root} holds no sound checkpoint to resume from, only {reasons}: choose another run.dir to "
            "start from scratch, or go on from the newest of these with checkpoint.accept_unsound=true"
        )
    return newest


def prepare_partial(root: Path, step: int) -> Path:
    """Create an empty folder to write `step` into; a left-over of an interrupted save is dropped."""
    folder = partial_folder(root, step)
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` sound checkpoints, oldest first.

    One that is damaged neither counts nor goes: it does not replace a good one, and is the user's to judge.
    """
    sound = [folder for folder in sound_checkpoints(root) if is_whole(folder)]
    for folder in sound[:-keep]:
        discard(folder)


def prune_unsound(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` of those that were set aside."""
    unsound = unsound_checkpoints(root)
    for folder in unsound[: len(unsound) - keep]:
        discard(folder)


def mark_proven(root: Path, step: int) -> None:
    """Note that the weights of a checkpoint are good: a sound step was taken from them."""
    if (folder := step_folder(root, step)).is_dir():
        (folder / PROVEN).touch()


def set_aside(root: Path, step: int, why: str) -> Path | None:
    """Mark the checkpoint of `step` as unsound, because what came after it showed that it is.

    Returns its new place, or None if there is no such checkpoint, or it is proven to be good.
    """
    folder, target = step_folder(root, step), unsound_folder(root, step)
    if (folder / PROVEN).exists() or not is_whole(folder):
        return None
    write_durably(folder / f"{MANIFEST}.new", replace(read_manifest(folder), why_unsound=why).to_text())
    os.replace(folder / f"{MANIFEST}.new", folder / MANIFEST)
    discard(target)
    os.rename(folder, target)
    sync_folder(root)
    return target


def discard(folder: Path) -> None:
    """Delete a checkpoint so that no half of it is ever taken for one; of a link, the link alone."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    doomed = folder.with_name(folder.name + PARTIAL)
    remove(doomed)
    os.rename(folder, doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """Delete a folder, a file, or a link but not what it points to; nothing if nothing is there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def write_durably(path: Path, text: str) -> None:
    """Write a file that is on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk. File systems that cannot do that for folders are left alone."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _named(root: Path, suffix: str, *, folders_only: bool = True) -> list[Path]:
    """Entries of `root` called step_<N> and the suffix, in the order of steps; none without `root`."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in root.iterdir()
        if path.name.endswith(suffix)
        and (match := _STEP.fullmatch(path.name[: len(path.name) - len(suffix)]))
        and (path.is_dir() or not folders_only)
    ]
    return [path for _, path in sorted(found)]


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.is_dir()

"""Checkpoint folders: their names, which of them count, and which may go.

`checkpoints/step_<N>/` is a complete checkpoint, `step_<N>.partial` one that is being written or deleted, and
`step_<N>.unsound` one whose last step went wrong: kept aside to be looked at, never resumed from by itself,
and never counted in `checkpoint.keep`. A folder gets its final name when all of it is on disk, so whatever
happens to the job, a folder with the final name is whole, and a `.partial` is never read. Any of them may be
a symbolic link to a folder elsewhere: a link that has to go is removed, and what it points to stays.

In an object store, which has no rename, `step_<N>/` counts while its manifest is there, and an unsound one
keeps its name: the manifest says what it is. `storage/` knows these differences.

Needs no torch.
"""

import contextlib
import threading
from dataclasses import replace

from k25_train.checkpoint.manifest import read_manifest
from k25_train.checkpoint.storage.kinds import MANIFEST, STEP, UNSOUND, Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.errors import CheckpointError, DamagedCheckpointError

CONFIG = "config.yaml"
"""The configuration that the run had when it saved."""
DATA_STATE = "data_state.json"
"""How far its data had been read then (`data_state.py`)."""
PROVEN = "proven"
"""An empty file in a checkpoint from whose weights a sound step was taken: it is never set aside later."""
LATEST = "latest"
"""A text file next to the checkpoints that names one: sound, complete, its files' sizes verified."""
_POINTING = threading.Lock()
"""One thread completes a checkpoint while another prunes: what was seen first must not be written last."""


def step_folder(root: Place, step: int) -> Place:
    """Where the sound checkpoint of `step` belongs."""
    return root / f"step_{step}"


def unsound_folder(root: Place, step: int) -> Place:
    """Where a checkpoint of `step` is set aside."""
    return root / f"step_{step}{UNSOUND if storage_of(root).has_rename else ''}"


def has_step_name(folder: Place) -> bool:
    """Whether a folder is called as a checkpoint in a run folder is, sound or not."""
    return STEP.fullmatch(folder.name.removesuffix(UNSOUND)) is not None


def step_of(folder: Place) -> int:
    """The step in the name of a checkpoint, sound or not. Raises `CheckpointError` for another name."""
    match = STEP.fullmatch(folder.name.removesuffix(UNSOUND))
    if match is None:
        raise CheckpointError(f"{folder} is not a checkpoint: its name must be step_<N>")
    return int(match[1])


def list_checkpoints(root: Place) -> list[Place]:
    """Folders, or links to some, with the name of a complete checkpoint, oldest step first."""
    return [each for each in _named(root) if storage_of(root).is_complete(each)]


def sound_checkpoints(root: Place) -> list[Place]:
    """Of those, the ones that do not say that they are unsound, oldest step first.

    One whose manifest cannot be read is among them: a damaged checkpoint must not be passed over in silence.
    """
    return [folder for folder in list_checkpoints(root) if why_unsound(folder) == ""]


def unsound_checkpoints(root: Place) -> list[Place]:
    """Checkpoints that were set aside, and those that say so under another name, oldest step first."""
    found = [folder for folder in list_checkpoints(root) if why_unsound(folder) != ""]
    aside = [each for each in _named(root, UNSOUND) if storage_of(root).is_complete(each)]
    return sorted([*found, *aside], key=step_of)


def newest_checkpoint(root: Place, *, accept_unsound: bool = False) -> Place | None:
    """The checkpoint to resume from, or None. It is not verified yet."""
    found = sound_checkpoints(root)
    if accept_unsound:
        found = sorted([*unsound_checkpoints(root), *found], key=step_of)
    return found[-1] if found else None


def why_unsound(folder: Place) -> str:
    """What a complete checkpoint says to be wrong with it; empty if it is sound, or says nothing readable."""
    try:
        return read_manifest(folder).why_unsound
    except CheckpointError:
        return ""


def is_whole(folder: Place) -> bool:
    """Whether the manifest is readable and every file has its size."""
    try:
        files = read_manifest(folder).files
    except CheckpointError:
        return False
    sizes = storage_of(folder).sizes(folder, files)
    return all(sizes.get(name) == file.num_bytes for name, file in files.items())


def start_from(root: Place, *, accept_unsound: bool = False) -> Place | None:
    """The checkpoint to resume from, or None, after deleting what interrupted saves and deletions left.

    Only for the start of a run, while no rank is saving. Raises `CheckpointError` if the folder cannot be
    read, if the newest checkpoint is a link that leads nowhere, or if all checkpoints are unsound ones.
    """
    storage = storage_of(root)
    try:
        for left_over in storage.left_overs(root):
            storage.remove(left_over)
        newest = newest_checkpoint(root, accept_unsound=accept_unsound)
        links = [each for each in _named(root) if storage.has_rename and _leads_nowhere(each)]
        point_latest(root)
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read ({error}); see that all ranks may read it") from error
    if links and (newest is None or step_of(links[-1]) > step_of(newest)):
        older = f"resume from {newest.name}" if newest else "start from scratch"
        raise DamagedCheckpointError(
            f"{links[-1]} is a link to {links[-1].readlink()}, where no folder is: bring that back, or "
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


def prepare_partial(root: Place, step: int) -> Place:
    """An empty folder to write `step` into; a left-over of an interrupted save is dropped.

    Where it is only this call knows: rank 0 tells the others.
    """
    return storage_of(root).prepare(root, step)


def latest_checkpoint(root: Place) -> Place | None:
    """The checkpoint that `latest` names; None without that file.

    Raises `CheckpointError` if the file holds something else than a checkpoint's name.
    """
    try:
        name = storage_of(root).read(root / LATEST).strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{root / LATEST}: cannot be read ({error})") from error
    if not STEP.fullmatch(name):
        raise CheckpointError(f"{root / LATEST} names {name[:80]!r}, which is no checkpoint: remove the file")
    return root / name


def point_latest(root: Place, *, verified: Place | None = None, never: Place | None = None) -> None:
    """Have `latest` name the newest sound checkpoint that is whole; without one, the file goes.

    Args:
        root: where the checkpoints are.
        verified: one whose sizes have been compared just now.
        never: one that is about to go.
    """
    with _POINTING:
        candidates = [each for each in sound_checkpoints(root) if never is None or each.name != never.name]
        newest = next((each for each in reversed(candidates) if each == verified or is_whole(each)), None)
        try:
            now = latest_checkpoint(root)
        except CheckpointError:
            now = root
        if newest is not None and newest != now:
            storage_of(root).replace(root / LATEST, f"{newest.name}\n")
        elif newest is None and now is not None:
            storage_of(root).remove(root / LATEST)


def next_number(root: Place) -> int:
    """The number of the next sound checkpoint of a run, which counts on from the newest of now."""
    for folder in reversed(sound_checkpoints(root)):
        with contextlib.suppress(CheckpointError):
            return read_manifest(folder).number + 1
    return 1


def prune(root: Place, keep: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep` sound checkpoints, oldest first.

    One that is damaged neither counts nor goes: it does not replace a good one, and is the user's to judge.
    Every `keep_every`-th of the run stays as well.
    """
    sound = [folder for folder in sound_checkpoints(root) if is_whole(folder)]
    doomed = [each for each in sound[:-keep] if not _stays(each, keep_every)]
    if doomed:
        # Before what it may still name is gone.
        point_latest(root, verified=sound[-1])
    for folder in doomed:
        storage_of(root).discard(folder)


def prune_unsound(root: Place, keep: int) -> None:
    """Delete all but the newest `keep` of those that were set aside."""
    unsound = unsound_checkpoints(root)
    for folder in unsound[: len(unsound) - keep]:
        storage_of(root).discard(folder)


def mark_proven(root: Place, step: int) -> None:
    """Note that the weights of a checkpoint are good: a sound step was taken from them."""
    if storage_of(root).is_complete(folder := step_folder(root, step)):
        storage_of(root).replace(folder / PROVEN, "")


def set_aside(root: Place, step: int, why: str) -> Place | None:
    """Mark the checkpoint of `step` as unsound, because what came after it showed that it is.

    Returns its new place, or None if there is no such checkpoint, or it is proven to be good.
    """
    folder, storage = step_folder(root, step), storage_of(root)
    if (folder / PROVEN).exists() or not is_whole(folder):
        return None
    point_latest(root, never=folder)
    storage.replace(folder / MANIFEST, replace(read_manifest(folder), why_unsound=why).to_text())
    return storage.set_unsound_aside(folder)


def _stays(folder: Place, keep_every: int) -> bool:
    number = read_manifest(folder).number
    return bool(keep_every and number) and number % keep_every == 0


def _named(root: Place, suffix: str = "") -> list[Place]:
    """Entries of `root` called step_<N> and the suffix, in the order of steps; none without `root`."""
    found = [
        (int(match[1]), path)
        for path in storage_of(root).entries(root)
        if path.name.endswith(suffix) and (match := STEP.fullmatch(path.name[: len(path.name) - len(suffix)]))
    ]
    return [path for _, path in sorted(found, key=lambda each: each[0])]


def _leads_nowhere(path: Place) -> bool:
    return path.is_symlink() and not path.is_dir()

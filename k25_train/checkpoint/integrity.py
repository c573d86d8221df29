"""Whether a checkpoint is what was written: all files, their sizes, their content; and what to do if not.

Advice never destroys: a damaged checkpoint is restored or moved away, and the newest other one that is sound
and whole is named.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from k25_train.checkpoint import folders
from k25_train.checkpoint.manifest import FileEntry, Manifest, read_manifest
from k25_train.checkpoint.storage.kinds import MANIFEST, PARTIAL, Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.errors import CheckpointError, DamagedCheckpointError
from k25_train.run_folder.checkpoints import CHECKPOINTS

METADATA = ".metadata"
"""Which tensor is where, in torch's format."""
BACKEND = "metadata.json"
"""What wrote the checkpoint, in megatron-core's format."""
_BY_FIRST_RANK = {1: (METADATA, BACKEND, folders.CONFIG), 2: (METADATA, BACKEND, folders.CONFIG)}
"""Format -> small files that every checkpoint of it has."""
_NUM_THREADS = 4
"""Files that a rank reads at a time; hashing leaves Python's lock alone."""


def verify(folder: Place) -> Manifest:
    """Check that a checkpoint has all files in their sizes, and return its manifest.

    Of content it checks that of the small files, which are read before anything is loaded.

    Raises `DamagedCheckpointError` naming the first file that is missing, cut short or not in the manifest,
    with a remedy, or `CheckpointError` saying what the path is instead of a checkpoint.
    """
    check_is_checkpoint(folder)
    try:
        manifest = read_manifest(folder)
        _check_files(folder, manifest)
        for name in (folders.CONFIG, folders.DATA_STATE):
            check_content_of(folder, manifest, name)
    except CheckpointError as error:
        raise damaged(folder, error) from error
    return manifest


def check_is_checkpoint(folder: Place) -> None:
    """Raise `CheckpointError` for a path that nobody could have saved as a checkpoint, saying what it is."""
    if not storage_of(folder).has_rename:
        _check_is_prefix(folder)
        return
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, not the folder of a checkpoint")
    if not folder.is_dir():
        found = "is a link that leads nowhere" if folder.is_symlink() else "no such checkpoint"
        raise CheckpointError(f"{folder}: {found}; {folder.parent} {_holdings(folder.parent)}")
    if folder.name.endswith(PARTIAL):
        raise CheckpointError(
            f"{folder} was never completed: the run ended while it was saved; "
            f"{folder.parent} {_holdings(folder.parent)}"
        )
    if (folder / MANIFEST).exists():
        return
    for root in (folder / CHECKPOINTS, folder):
        if root.is_dir() and (root != folder or folders.list_checkpoints(root)):
            raise CheckpointError(f"{folder} is not a checkpoint; it {_holdings(root)}")
    if not folders.has_step_name(folder):
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}")


def _check_is_prefix(folder: Place) -> None:
    if not storage_of(folder).is_complete(folder):
        raise CheckpointError(
            f"{folder}: no such checkpoint, or one that was never completed: it has no {MANIFEST}; "
            f"{folder.parent} {_holdings(folder.parent)}"
        )


def damaged(folder: Place, what: object) -> DamagedCheckpointError:
    """The error for a damaged checkpoint, with the newest other one whose files are all there."""
    others = [each for each in folders.sound_checkpoints(folder.parent) if each.name != folder.name]
    whole = [each for each in others if folders.is_whole(each)]
    return damaged_with(folder, what, whole[-1] if whole else None)


def damaged_with(folder: Place, what: object, other: Place | None) -> DamagedCheckpointError:
    """The error for a damaged checkpoint if `other` is the newest one that is sound and whole."""
    instead = f"resume from {other}, which is whole" if other else "start from scratch: no other is whole"
    move = f"mv {folder} {folder}.damaged"
    if not storage_of(folder).has_rename:
        move = f"aws s3 mv {folder}/{MANIFEST} {folder}/{MANIFEST}.damaged"
    remedy = f"restore it from a copy, or move it away ({move}) to {instead}"
    return DamagedCheckpointError(f"{what}; {remedy}", folder, other)


def entry_of(path: Place) -> FileEntry:
    """Size and hash of a file. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        return FileEntry(file.tell(), digest.hexdigest())


def changed_files(folder: Place, files: Mapping[str, FileEntry], share: int, num_shares: int) -> list[str]:
    """What is wrong with the content of share number `share` of the files; empty if all are as written.

    Files without a checksum are not read. The largest file comes first, and shares get every n-th.
    """
    by_size = sorted(
        (name for name, file in files.items() if file.sha256),
        key=lambda name: (-files[name].num_bytes, name),
    )

    def problem(name: str) -> str:
        try:
            found = entry_of(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read ({error})"
        return "" if found == files[name] else f"{folder / name}: its content changed since it was saved"

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return [found for found in pool.map(problem, by_size[share::num_shares]) if found]


def check_content_of(folder: Place, manifest: Manifest, name: str) -> None:
    """Raise `CheckpointError` if one file is not as it was written."""
    if name in manifest.files and (changed := changed_files(folder, {name: manifest.files[name]}, 0, 1)):
        raise CheckpointError(changed[0])


def _check_files(folder: Place, manifest: Manifest) -> None:
    if folders.has_step_name(folder) and manifest.step != folders.step_of(folder):
        raise CheckpointError(
            f"{folder} holds step {manifest.step}: it was renamed, or its files were replaced"
        )
    for name in _BY_FIRST_RANK.get(manifest.version, (folders.CONFIG,)):
        if name not in manifest.files:
            raise CheckpointError(f"{folder / MANIFEST} does not list {name}")
    sizes = storage_of(folder).sizes(folder, manifest.files)
    for name, file in manifest.files.items():
        found = sizes.get(name)
        if found != file.num_bytes:
            state = "is missing" if found is None else f"has {found} bytes instead of {file.num_bytes}"
            raise CheckpointError(f"{folder / name} {state}: the checkpoint is incomplete")
    # Loaders of `.distcp` files would read these though no rank wrote them.
    for path in storage_of(folder).entries(folder) if METADATA in manifest.files else ():
        if path.name not in manifest.files and (path.name == "common.pt" or path.name.endswith(METADATA)):
            raise CheckpointError(f"{path} is not a file of this checkpoint: its manifest does not list it")


def _holdings(root: Place) -> str:
    sound = [path.name for path in folders.sound_checkpoints(root)]
    unsound = [f"{path.name} (unsound)" for path in folders.unsound_checkpoints(root)]
    if not sound and not unsound:
        return "holds none"
    names = ", ".join([*sound, *unsound])
    return f"holds {names}: name one, as {root / (sound[-1:] or [unsound[-1].split()[0]])[0]}"

"""How a written checkpoint becomes complete: what must be true first, and the order of changes on storage."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace

from k25_train.checkpoint import folders
from k25_train.checkpoint.heads import changed_heads
from k25_train.checkpoint.manifest import FileEntry, Manifest
from k25_train.checkpoint.storage.kinds import DAMAGED, MANIFEST, UNSOUND, Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.errors import CheckpointError

PATIENCE_S = 10.0
"""How long the first rank waits to see a file that another node wrote: network file systems keep what they
know of a folder for some seconds."""
RETRY_S = 0.2


def publish(root: Place, partial: Place, manifest: Manifest, texts: Mapping[str, str]) -> Place:
    """Give a written checkpoint its small files, its manifest and its final name, which is returned.

    `latest` names it afterwards if it is sound.

    Args:
        root: where the checkpoints are.
        partial: the folder that the files are in, as `folders.prepare_partial` gave it.
        manifest: what is known of the checkpoint; its files are those that the ranks say they wrote.
        texts: small files by name, the run's configuration among them.

    Raises `CheckpointError` if a file is not there as it was written, or the name is taken; OSError.
    """
    storage = storage_of(root)
    check_complete(partial, manifest.files)
    has_reason = bool(manifest.why_unsound)
    final = (folders.unsound_folder if has_reason else folders.step_folder)(root, manifest.step)
    if storage.has_rename:
        home, files = partial, dict(manifest.files)
    else:
        home, files = final, {f"{partial.name}/{name}": file for name, file in manifest.files.items()}
    make_way(final, keep=partial.name)
    # What is on disk must be on disk before the name says so.
    for name, text in texts.items():
        storage.write(home / name, text)
        files[name] = FileEntry(len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
    text = replace(manifest, files=files, number=folders.next_number(root)).to_text()
    try:
        storage.commit(partial, final, MANIFEST, text)
    except OSError as error:
        if not storage.is_complete(final):
            raise
        # A client that repeats a request whose answer was lost finds that it is done.
        is_mine = storage.read(final / MANIFEST) == text
        if not is_mine:
            raise taken(final) from error
        if not isinstance(error, FileNotFoundError | FileExistsError):
            raise
    if not has_reason:
        folders.point_latest(root, verified=final)
    return final


def check_complete(partial: Place, written: Mapping[str, FileEntry]) -> None:
    """Raise `CheckpointError` unless every file is here as its rank wrote it: its size, and its head with the
    checksums of all that is in it."""
    deadline, storage = time.monotonic() + PATIENCE_S, storage_of(partial)
    missing = dict(written)
    while True:
        sizes = storage.sizes(partial, missing)
        missing = {name: file for name, file in missing.items() if sizes.get(name) != file.num_bytes}
        if not missing or time.monotonic() >= deadline:
            break
        time.sleep(RETRY_S)
    for name, file in missing.items():
        seen = f"sees {sizes[name]} bytes" if name in sizes else "does not see it"
        raise CheckpointError(
            f"{partial / name}: a rank wrote {file.num_bytes} bytes, but the first rank {seen}: the place of "
            "the checkpoints must be one that all nodes share"
        )
    for problem in changed_heads(partial, written):
        raise CheckpointError(f"{problem}: see that no other job writes there")


def make_way(final: Place, keep: str = "") -> None:
    """Free the name of a checkpoint that is about to get it; nothing that is sound and whole has to go.

    `keep` is what has just been written there, in an object store. Raises `CheckpointError` if there is one
    that is sound and whole.
    """
    storage = storage_of(final)
    if storage.has_rename and (final.name.endswith(UNSOUND) or is_link_to_nothing(final)):
        storage.discard(final)
    elif not storage.is_complete(final):
        return
    elif folders.why_unsound(final):
        if storage.set_unsound_aside(final) == final:
            storage.discard(final, keep)
    elif folders.is_whole(final) or (
        storage.has_rename and final.with_name(f"{final.name}{DAMAGED}").exists()
    ):
        raise taken(final)
    else:
        storage.set_damaged_aside(final)


def taken(final: Place) -> CheckpointError:
    """The error of a name that another checkpoint has."""
    return CheckpointError(
        f"{final} is there already, and stays: see that no other job writes into this run folder, or move it "
        "away"
    )


def is_link_to_nothing(path: Place) -> bool:
    """Whether a link is there, and nothing behind it."""
    return path.is_symlink() and not path.exists()

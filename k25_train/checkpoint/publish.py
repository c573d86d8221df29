"""How a written checkpoint becomes complete: what must be true first, and the order of changes on disk."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from k25_train.checkpoint import folders
from k25_train.checkpoint.integrity import BACKEND, METADATA, entry_of
from k25_train.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from k25_train.errors import CheckpointError

PATIENCE_S = 10.0
"""How long the first rank waits to see a file that another node wrote: network file systems keep what they
know of a folder for some seconds."""


def publish(
    root: Path,
    step: int,
    *,
    named: Mapping[str, int],
    written: Mapping[str, FileEntry],
    texts: Mapping[str, str],
    facts: Mapping[str, str],
    losses: Sequence[float],
    why_unsound: str,
) -> Path:
    """Give the written checkpoint its small files, its manifest and its final name, which is returned.

    Args:
        named: files that `.metadata` names -> bytes that they must have at least.
        written: files that the ranks say they wrote, with what they found in them.
        texts: small files by name, the run's configuration among them.
        facts: what is true of the data it was trained on.
        losses: of the last sound steps.
        why_unsound: why it is set aside instead, as `step_<N>.unsound`; empty for a sound one.

    Raises `CheckpointError` if a file is not there as it was written, or the name is taken; OSError.
    """
    partial = folders.partial_folder(root, step)
    check_complete(partial, named, written)
    # What is on disk must be on disk before the name says so.
    for name, text in texts.items():
        folders.write_durably(partial / name, text)
    own = {name: entry_of(partial / name) for name in (METADATA, BACKEND, *texts)}
    manifest = Manifest(
        step=step, files={**written, **own}, why_unsound=why_unsound, facts=facts, losses=losses
    )
    folders.write_durably(partial / MANIFEST, manifest.to_text())
    folders.sync_folder(partial)
    final = folders.unsound_folder(root, step) if why_unsound else folders.step_folder(root, step)
    make_way(final)
    os.rename(partial, final)
    folders.sync_folder(root)
    return final


def check_complete(partial: Path, named: Mapping[str, int], written: Mapping[str, FileEntry]) -> None:
    """Raise `CheckpointError` unless every file that `.metadata` names is here as its rank wrote it."""
    deadline = time.monotonic() + PATIENCE_S
    for name, least_bytes in named.items():
        entry = written.get(name)
        if entry is None:
            raise CheckpointError(f"{partial / name}: no rank wrote it, though {METADATA} names it")
        while (found := folders.size_of(partial / name)) != entry.num_bytes and time.monotonic() < deadline:
            time.sleep(0.2)
        if found != entry.num_bytes or found < least_bytes:
            seen = "the first rank does not see it" if found is None else f"the first rank sees {found} bytes"
            raise CheckpointError(
                f"{partial / name}: a rank wrote {entry.num_bytes} bytes, but {seen}: the run folder must be "
                "one that all nodes share"
            )


def make_way(final: Path) -> None:
    """Free the name of a checkpoint that is about to get it; nothing that is sound and whole has to go.

    Raises `CheckpointError` if there is one.
    """
    is_link_to_nothing = final.is_symlink() and not final.exists()
    if is_link_to_nothing or final.name.endswith(folders.UNSOUND):
        folders.discard(final)
    elif not final.exists():
        return
    elif folders.why_unsound(final):
        aside = folders.unsound_folder(final.parent, folders.step_of(final))
        folders.discard(aside)
        os.rename(final, aside)
    elif folders.is_whole(final) or (aside := final.with_name(f"{final.name}.damaged")).exists():
        raise CheckpointError(
            f"{final} is there already, and stays: see that no other job writes into this run folder, or "
            "move it away"
        )
    else:
        os.rename(final, aside)

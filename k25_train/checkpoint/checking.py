"""What must be true of a checkpoint before any of it is loaded."""

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch.distributed as dist

from k25_train.checkpoint import folders
from k25_train.checkpoint.agreement import on_every_rank, on_first_rank
from k25_train.checkpoint.continuity import (
    NOT_OF_WEIGHTS,
    OF_COMPUTATION,
    SAME_MODEL,
    SAME_RUN,
    changed_facts,
    check_continuity,
    check_facts,
)
from k25_train.checkpoint.files.plain_pickle import bytes_by_file
from k25_train.checkpoint.heads import changed_heads
from k25_train.checkpoint.integrity import (
    METADATA,
    changed_files,
    check_content_of,
    damaged,
    damaged_with,
    verify,
)
from k25_train.checkpoint.manifest import Kind, Manifest, read_manifest
from k25_train.checkpoint.storage.kinds import Place
from k25_train.config.schema import Config
from k25_train.errors import CheckpointError


def check(folder: Place, config: Config, facts: Mapping[str, str], *, resumes: bool) -> Manifest:
    """All that one rank can see is wrong with a checkpoint; returns its manifest."""
    manifest = verify(folder)
    if METADATA in manifest.files:
        _check_metadata(folder, manifest)
    if resumes:
        check_same_run(folder, config, facts)
    else:
        but = NOT_OF_WEIGHTS if manifest.kind is Kind.WEIGHTS else OF_COMPUTATION
        check_continuity(folder, config, SAME_MODEL, but=but)
    return manifest


def _check_metadata(folder: Place, manifest: Manifest) -> None:
    """Whether the list of tensors in a checkpoint of format 1 or 2 is as it was written, and of its files."""
    try:
        check_content_of(folder, manifest, METADATA)
        named = bytes_by_file(Path(str(folder)) / METADATA)
    except CheckpointError as error:
        raise damaged(folder, error) from error
    except (OSError, pickle.UnpicklingError) as error:
        raise damaged(folder, f"{folder / METADATA}: {error}") from error
    if strays := [name for name in named if name not in manifest.files]:
        raise damaged(folder, f"{folder / METADATA} names {strays[0]}, which the manifest does not list")


def check_same_run(folder: Place, config: Config, facts: Mapping[str, str]) -> None:
    """Raise `CheckpointError` unless configuration and data are those of the training so far."""
    check_continuity(folder, config, SAME_RUN)
    saved = read_manifest(folder).facts
    check_facts(folder, saved, facts, accept=config.checkpoint.accept_changed_data)


def notes_on(folder: Place, facts: Mapping[str, str]) -> list[str]:
    """What to know of a checkpoint that was loaded, a line each; none if all is as it should be."""
    manifest = read_manifest(folder)
    if manifest.kind is Kind.WEIGHTS:
        # Its facts are of where it came from, not of data.
        return []
    notes = [] if manifest.is_sound else [f"{folder} is unsound: {manifest.why_unsound}"]
    if not manifest.has_checksums:
        notes.append(f"{folder} was saved without checksums: the content of its files was not checked")
    if manifest.version == 1:
        notes.append(f"{folder} was saved without facts of the data: whether they changed is not known")
    changed = changed_facts(manifest.facts, facts)
    return [*notes, *([f"{folder} was trained on other data:", *changed] if changed else [])]


def losses_before(folder: Place, facts: Mapping[str, str]) -> list[float]:
    """Losses that those of a run which resumes from the checkpoint are compared with.

    None if it is unsound or was trained on other data: both were accepted by hand, and what is to come is not
    known.
    """
    manifest = read_manifest(folder)
    if not manifest.is_sound or changed_facts(manifest.facts, facts):
        return []
    return list(manifest.losses)


def check_content(folder: Place, manifest: Manifest) -> None:
    """Raise `DamagedCheckpointError` for a file whose content changed, naming the newest other whole one."""
    changed = _changed(folder, manifest)
    if not changed:
        return
    raise damaged_with(folder, changed, newest_whole_other(folder))


def newest_whole_other(folder: Place) -> Place | None:
    """The newest other checkpoint that is sound and as it was written; None if there is none.

    Called by every rank. Its tensors are not read: what the heads of files and the small ones tell counts.
    """
    others = on_first_rank(lambda: folders.sound_checkpoints(folder.parent))
    for other in reversed(others):
        whole = other.name != folder.name and on_first_rank(partial(folders.is_whole, other))
        if whole and not _changed(other, on_first_rank(partial(read_manifest, other))):
            return other
    return None


def _changed(folder: Place, manifest: Manifest) -> str:
    """The first file whose content is not as it was written, and how many more; each rank reads its share."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    heads = dict(list(manifest.part_files.items())[rank::num_ranks])
    by_rank = on_every_rank(
        lambda: [*changed_files(folder, manifest.files, rank, num_ranks), *changed_heads(folder, heads)]
    )

    def first() -> str:
        found = [each for share in by_rank for each in share]
        return "; ".join(found[:1]) + (f" (and {len(found) - 1} more files)" if len(found) > 1 else "")

    return on_first_rank(first)

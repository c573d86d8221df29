"""Which checkpoint a command is about: its folder or URL, or the run whose newest one it is."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_train.checkpoint import folders
from k25_train.checkpoint.continuity import saved_config
from k25_train.checkpoint.integrity import check_is_checkpoint
from k25_train.checkpoint.storage.kinds import MANIFEST, Place
from k25_train.checkpoint.storage.places import place_of
from k25_train.errors import CheckpointError, ConfigError
from k25_train.run_folder.checkpoints import CHECKPOINTS

WHERE = "folder or s3:// URL of a checkpoint or an import; of a run, its newest checkpoint"
INDEX = "model.safetensors.index.json"
"""What a Hugging Face folder of several files has."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint, and how it was found."""

    folder: Place
    note: str
    """What to tell of that; empty where the user named it."""


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Declare `--threads`."""
    parser.add_argument(
        "--threads", type=int, metavar="N", help="pieces of tensors that are looked at at a time (all cores)"
    )


def num_threads(options: argparse.Namespace) -> int:
    """The number given, or one per core that this process may use. Raises ConfigError for less than one."""
    if options.threads is None:
        return len(os.sched_getaffinity(0))
    if options.threads < 1:
        raise ConfigError(f"--threads {options.threads}: must be at least 1")
    return int(options.threads)


def chosen(text: str) -> Choice:
    """The checkpoint that a user means by a path or URL.

    Raises `CheckpointError` saying what is there instead if it is none, and `ConfigError` for a URL that
    cannot be opened.
    """
    place = place_of(text)
    if _is_there(place / MANIFEST):
        return Choice(place, "")
    for root in roots_of(place) if not isinstance(place, Path) or place.is_dir() else ():
        newest = folders.latest_checkpoint(root) or folders.newest_checkpoint(root)
        if newest is not None:
            return Choice(newest, f"{place}: its newest checkpoint is {newest.name}")
    if _is_there(place / INDEX) or _is_there(place / "model.safetensors"):
        raise CheckpointError(
            f"{place} is a Hugging Face folder, not a checkpoint: make one of it with "
            f"`k25-convert import {place} FOLDER`"
        )
    check_is_checkpoint(place)
    raise CheckpointError(f"{place} is not a checkpoint: it has no {MANIFEST}")


def roots_of(place: Place) -> list[Place]:
    """Folders of checkpoints that a run folder leads to, or the place itself if it is one."""
    config = place / folders.CONFIG
    named: Sequence[Any] = ()
    if _is_there(config) and not _is_there(place / MANIFEST):
        checkpoint = saved_config(config).get("checkpoint")
        named = [checkpoint.get("dir")] if isinstance(checkpoint, dict) else []
    elsewhere = [place_of(each) for each in named if isinstance(each, str)]
    return [*elsewhere, place / CHECKPOINTS, place]


def _is_there(path: Place) -> bool:
    try:
        return path.exists()
    except OSError:
        return False

"""Where a run's checkpoints are, and what they lie on."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k25_train.checkpoint.storage.kinds import Place, Storage
from k25_train.checkpoint.storage.posix import PosixStorage
from k25_train.errors import ConfigError
from k25_train.run_folder.checkpoints import CHECKPOINTS

if TYPE_CHECKING:
    from k25_train.checkpoint.storage.objects import ObjectStorage

POSIX = PosixStorage()
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_LOCAL = ("file://", "local://")


def place_of(text: str) -> Place:
    """The file or folder that a path or URL names.

    Raises `ConfigError` for a URL whose kind of store is not known, or whose client is not installed.
    """
    for prefix in _LOCAL:
        text = text.removeprefix(prefix)
    if not _URL.match(text):
        return Path(text)
    try:
        # Imported here: launching on local folders needs none of it.
        from upath import UPath

        # Without its cache of listings, which would not see what other processes write.
        place = UPath(text, use_listings_cache=False)
        _ = place.fs
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{text}: cannot be opened ({error}); use a folder, or s3://BUCKET/PREFIX with s3fs installed"
        ) from error
    return place


def checkpoints_of(run_dir: str, checkpoint_dir: str | None) -> Place:
    """Where the checkpoints of a run are, by `run.dir` and `checkpoint.dir`.

    A folder is reached through the run folder, which leads there (`run_folder/checkpoints.py`).
    """
    is_url = checkpoint_dir is not None and _URL.match(checkpoint_dir)
    return place_of(checkpoint_dir or "") if is_url else Path(run_dir) / CHECKPOINTS


def storage_of(place: Place) -> Storage[Any]:
    """What a place lies on."""
    return POSIX if isinstance(place, Path) else _objects()


def _objects() -> "ObjectStorage":
    from k25_train.checkpoint.storage.objects import ObjectStorage

    return ObjectStorage()

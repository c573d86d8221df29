"""What is wrong with a file, told from what is wrong with the way to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import PickleError

from upath import UPath

from k25_train.checkpoint.files.access import ShortFileError
from k25_train.errors import CheckpointError, DamagedCheckpointError

_LOST = (ValueError, KeyError, PickleError, FileNotFoundError, ShortFileError)
"""Errors of what a store holds, not of the way to it."""


@contextmanager
def damage(folder: Path | UPath, name: str, entry: str = "") -> Iterator[None]:
    """What is wrong with a file becomes a DamagedCheckpointError that names it, and what was to be read.

    An object store that does not answer has not lost what it holds: a CheckpointError.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # file systems of fsspec raise what their libraries do
        reading = f" ({entry} was to be read)" if entry else ""
        what = f"{folder / name}: {error}{reading}"
        if isinstance(folder, Path) or isinstance(error, _LOST):
            raise DamagedCheckpointError(what, folder, None) from error
        cause = f"{what} [{type(error).__name__}]"
        raise CheckpointError(f"{cause}: its store does not answer; try again when it does") from error

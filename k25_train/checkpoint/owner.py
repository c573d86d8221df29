"""Whose checkpoints a place has that `checkpoint.dir` names: two runs that share one delete each other's.

The lock of a run folder keeps other jobs out of that folder alone. So the first run leaves its id where its
checkpoints go, and any other is refused.
"""

import contextlib
from pathlib import Path

from k25_train.checkpoint.local.store import identity_of_run
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.errors import ConfigError

OWNER = "owner"
"""The file: the id of the run, and where its folder was."""


def own(place: Place, run: Path) -> None:
    """Take a place for the run of a folder, which it may have already; for whoever holds that folder.

    Raises `ConfigError` if it is another run's, or cannot be used.
    """
    path, mine = place / OWNER, identity_of_run(run)
    try:
        if (found := _read(place)) is None:
            with contextlib.suppress(FileExistsError):
                storage_of(place).write(path, f"{mine}\n{run.absolute()}\n")
            found = _read(place) or ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint.dir: {path} can neither be read nor written ({error})") from error
    identity, _, folder = found.partition("\n")
    if identity != mine or _is_copy(run, Path(folder.strip())):
        raise ConfigError(
            f"checkpoint.dir: {place} has the checkpoints of the run in {folder.strip()}, and run.dir={run} "
            "would delete them as it adds its own: name another place; if that run is given up, and this one "
            f"is to go on from there, remove {path}"
        )


def _read(place: Place) -> str | None:
    try:
        return storage_of(place).read(place / OWNER)
    except FileNotFoundError:
        return None


def _is_copy(run: Path, first: Path) -> bool:
    """Whether the folder that took the place is still there, and is not this one."""
    return first.is_dir() and not first.samefile(run)

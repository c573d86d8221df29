"""Whose checkpoints a place has, such as `checkpoint.dir`: two runs that share one delete each other's.

The lock of a run folder keeps other jobs out of that folder alone. So the first run leaves its id where its
checkpoints go, and any other is refused.
"""

import contextlib
from pathlib import Path

from k25_train.checkpoint.local.store import identity_of_run
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import checkpoints_of, storage_of
from k25_train.errors import ConfigError
from k25_train.run_folder.record import LOCK

OWNER = "owner"
"""The file: the id of the run, and where its folder was."""


def own_checkpoints(run_dir: str, checkpoint_dir: str | None) -> None:
    """Take the place of a run's checkpoints, by `run.dir` and `checkpoint.dir`; raises as `own` does."""
    own(checkpoints_of(run_dir, checkpoint_dir), Path(run_dir), is_named=checkpoint_dir is not None)


def own(place: Place, run: Path, *, is_named: bool) -> None:
    """Take a place for the run of a folder, which it may have already; for whoever holds that folder.

    `is_named`: whether `checkpoint.dir` names the place; one in the run folder is the run's without a file.

    Raises `ConfigError` if it is another run's, or cannot be used.
    """
    path, found = place / OWNER, None
    try:
        found = _read(place)
        if found is None and not is_named:
            return
        mine = identity_of_run(run)
        if found is None:
            check_not_in_use(place, run)
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


def check_not_in_use(place: Place, run: Path) -> None:
    """Raise `ConfigError` if a place is in the folder of another run that holds its lock."""
    home = place.resolve().parent if isinstance(place, Path) else run
    if home != run.resolve() and (home / LOCK).exists():
        raise ConfigError(
            f"checkpoint.dir: {place} is in run.dir={home}, which is in use: name another place"
        )


def _read(place: Place) -> str | None:
    try:
        return storage_of(place).read(place / OWNER)
    except FileNotFoundError:
        return None


def _is_copy(run: Path, first: Path) -> bool:
    """Whether the folder that took the place is still there, and is not this one."""
    return first.is_dir() and not first.samefile(run)

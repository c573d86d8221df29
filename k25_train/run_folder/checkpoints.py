"""`checkpoints` in a run folder: where the run's checkpoints are, or what leads there.

Whoever looks after a run (supervisor, status, preflight) looks there, and so do people. With `checkpoint.dir`
it is a link to that folder. With a URL it is a folder that holds the URL (`place`) and an empty file per
checkpoint that was there last, `step_<N>`: what is in the store counts, this only tells of it.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from k25_train.errors import ConfigError

CHECKPOINTS = "checkpoints"
PLACE = "place"
"""File with the URL of checkpoints in an object store."""


def bind(run: Path, wanted: str | None) -> None:
    """Have `checkpoints` in an existing run folder lead to `checkpoint.dir`, which is made if it is a folder.

    For whoever holds the run folder. Raises `ConfigError` if the run's checkpoints are elsewhere already: it
    would start from scratch; or if either cannot be made.
    """
    home = run / CHECKPOINTS
    try:
        known = url_of(run)
        if wanted is None and known is None:
            return
        if wanted is None:
            raise _elsewhere(run, wanted, known or "")
        if "://" in wanted:
            _bind_to_url(run, wanted.rstrip("/"), known)
        else:
            _bind_to_folder(run, Path(wanted).absolute(), known)
    except OSError as error:
        raise ConfigError(
            f"checkpoint.dir={wanted}: cannot be made, or {home} cannot lead there ({error}): choose another "
            "folder, or null for one in the run folder"
        ) from error


def url_of(run: Path) -> str | None:
    """Where the checkpoints of a run are, if that is an object store. Raises OSError."""
    try:
        return (run / CHECKPOINTS / PLACE).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def note_steps(run: Path, steps: Iterable[int]) -> None:
    """Note which checkpoints are in the object store now. Raises OSError."""
    home, names = run / CHECKPOINTS, {f"step_{step}" for step in steps}
    noted = {path.name for path in home.glob("step_*") if path.is_file()}
    for name in names - noted:
        (home / name).touch()
    for name in noted - names:
        (home / name).unlink(missing_ok=True)


def _bind_to_folder(run: Path, target: Path, known: str | None) -> None:
    home = run / CHECKPOINTS
    if home.is_symlink() and not home.exists():
        raise _elsewhere(run, str(target), str(home.readlink()))
    target.mkdir(parents=True, exist_ok=True)
    if home.exists():
        if os.path.samefile(home, target):
            return
        if home.is_symlink() or _is_used(home):
            raise _elsewhere(run, str(target), known or str(home.resolve()))
        home.rmdir()
    home.symlink_to(target)


def _bind_to_url(run: Path, url: str, known: str | None) -> None:
    home = run / CHECKPOINTS
    if known == url:
        return
    if known is not None or home.is_symlink() or (home.exists() and _is_used(home)):
        raise _elsewhere(run, url, known or str(home.resolve()))
    home.mkdir(exist_ok=True)
    scratch = home / f".{PLACE}"
    scratch.write_text(f"{url}\n", encoding="utf-8")
    os.replace(scratch, home / PLACE)


def _is_used(folder: Path) -> bool:
    """Whether something of a run is in it; names with a dot are what nodes leave there for each other."""
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _elsewhere(run: Path, wanted: str | None, known: str) -> ConfigError:
    return ConfigError(
        f"checkpoint.dir={'null' if wanted is None else wanted}, but {run / CHECKPOINTS} says that the "
        f"checkpoints of this run are in {known}: the run would start from scratch. Set checkpoint.dir to "
        "that, or move them and what leads there, or choose another run.dir"
    )

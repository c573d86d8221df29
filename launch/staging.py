"""A submission on its way into the run folder: complete, in a folder of its own, until SLURM has queued it.

Its token is in that folder's name, in the path of the script that SLURM gets, and in submit.json.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launch.submission import CONFIG, FACTS, SCRIPT, Submission

STAGED = "submit.new."
"""Beginning of the folder's name; the token follows."""


def folder_of(run: Path, token: str) -> Path:
    """Where a submission waits for its job."""
    return run / f"{STAGED}{token}"


def stage(run: Path, submission: Submission, config: str, script: str) -> Path:
    """Write a submission to a folder of its own and return its script. Raises OSError if that fails."""
    folder = folder_of(run, submission.token)
    folder.mkdir()
    (folder / CONFIG).write_text(config, encoding="utf-8")
    (folder / SCRIPT).write_text(script, encoding="utf-8")
    submission.write(folder)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return folder / SCRIPT


def commit(run: Path, token: str) -> None:
    """Have a submission replace the run's earlier one; goes on with what another process did not finish."""
    folder = folder_of(run, token)
    for name in (CONFIG, FACTS, SCRIPT):
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / name, run / name)
    discard(folder)


def discard(folder: Path) -> None:
    """Remove a staged submission; one that is gone is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def staged(run: Path) -> Iterator[Path]:
    """The folders of all submissions that were not completed."""
    yield from run.glob(f"{STAGED}*")

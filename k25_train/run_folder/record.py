"""What a lock says of its holder, as it lies in the run folder."""

import getpass
import json
import os
import shlex
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k25_train.errors import K25Error
from k25_train.run_folder.process import Process

LOCK = "lock.json"
FORMAT_VERSION = 2
"""Version 1 was `{"job_id": N}`, written for SLURM jobs only."""
SINCE_FORMAT = "%Y-%m-%d %H:%M:%S %z"
MAX_COMMAND_LENGTH = 200
"""Characters of the holder's command that are kept."""


class LockedError(K25Error):
    """The run folder belongs to another run, or no longer to this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a run folder: a SLURM job, across requeues and restarts of its ranks; a process; or a process
    of a job."""

    id: str
    """Unique to this holder."""
    job_id: int | None
    """SLURM job that the folder belongs to; None if it belongs to a process alone."""
    process: Process | None
    """Process that writes; None while no rank of the job does."""
    since: str
    """When it took the folder, by its own clock, for people."""
    user: str
    command: str

    def to_json(self) -> str:
        """As it is written to the lock."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}) + "\n"

    def describe(self) -> str:
        """The process in words, for an error that follows the name of the folder."""
        if self.process is None:
            return f"job {self.job_id}"
        owner = f" of {self.user}" if self.user else ""
        return (
            f"process {self.process.pid} on {self.process.host}{owner}, since {self.since} ({self.command})"
        )


def new_holder(job_id: int | None, process: Process | None) -> Holder:
    """The calling process's own record."""
    command = " ".join(shlex.join(sys.orig_argv).split())
    return Holder(
        id=uuid.uuid4().hex,
        job_id=job_id,
        process=process,
        since=time.strftime(SINCE_FORMAT),
        user=_user(),
        command=command if len(command) <= MAX_COMMAND_LENGTH else command[:MAX_COMMAND_LENGTH] + "…",
    )


def parse(path: Path, text: str) -> Holder:
    """A record of any version. Raises `LockedError` if it is damaged."""
    try:
        values = json.loads(text)
        if values.keys() == {"job_id"}:
            job = int(values["job_id"])
            return Holder(id=f"job_{job}", job_id=job, process=None, since="", user="", command="")
        return _checked(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LockedError(
            f"{path}: is damaged, so it cannot tell who holds the folder ({error or 'empty'}): if no other "
            "run writes to this folder and no job on it is queued, delete this file"
        ) from error


def _checked(values: dict[str, Any]) -> Holder:
    version = values.pop("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format {version}, this version reads up to {FORMAT_VERSION}")
    process = values.pop("process")
    found = Holder(**values, process=None if process is None else Process(**process))
    job, pid = found.job_id, 0 if found.process is None else found.process.pid
    # The id is part of file names.
    if not (found.id.isalnum() and isinstance(job, int | None) and isinstance(pid, int)):
        raise ValueError("fields of the wrong kind")
    if job is None and found.process is None:
        raise ValueError("neither a job nor a process")
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may have no entry for the user.
        return str(os.getuid())

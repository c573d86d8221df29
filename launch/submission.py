"""What a submitted run keeps in its folder, so that it can continue without the command that submitted it.

    submit.sbatch           the script; `sbatch` on it continues the run
    submit.yaml             the resolved configuration that every attempt trains
    submit.json             this module's `Submission`
    submit.new.TOKEN/       these three while they are being submitted (`queueing`)
    lock.json               the job that holds the folder, if any
    supervisor.log          the supervisor's decisions, across all jobs
    attempts/<N>/           one start of the ranks: attempt.json, rank_<R>.log, node_<NODE>.log, srun.log, and
                            preflight.json with preflight.log if the nodes were checked first
    attempts/latest         link to the newest attempt

Imports only the standard library, since it also runs on nodes whose Python has nothing else.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k25_train.errors import ConfigError

SCRIPT, CONFIG, FACTS = "submit.sbatch", "submit.yaml", "submit.json"
SUPERVISOR_LOG = "supervisor.log"
_ADDED: dict[str, Any] = {
    "address_family": "ipv4",
    "cpus_per_task": None,
    "step_options": [],
    "node_start": [],
    "comment": None,
    "checkpoint_bytes": 0,
    "max_checkpoints": 0,
    "max_log_bytes": 0,
    "planned_step_s": None,
}
"""Facts that earlier versions did not write, with what they did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What the supervisor needs to know about a run."""

    run: str
    """The run folder, absolute."""
    checkout: str
    """Folder of the code, absolute."""
    code: str
    """Commit of the code, and whether there were local changes."""
    python: str
    """Python that runs the ranks, as found on the nodes or in their container."""
    num_steps: int
    """`train.steps`."""
    ranks_per_node: int
    legal_nodes: list[int]
    """Node counts on which the run can go on, ascending; the last is `cluster.nodes`."""
    spare_nodes: int
    """`cluster.slurm.spare_nodes`."""
    max_restarts: int
    """Limit of consecutive restarts without progress."""
    restart_wait_s: float
    """`cluster.slurm.restart_wait_s`."""
    stop_within_s: float
    """How long ranks may take to stop; less than `cluster.slurm.stop_before_end_s`, so that there is time
    left to requeue the job."""
    preflight: bool
    """`cluster.slurm.preflight`."""
    rendezvous_port: int
    """`cluster.slurm.rendezvous_port`."""
    interface: str | None
    """Network interface of the rendezvous; None for the address of the host's name."""
    address_family: str
    """`ipv4` or `ipv6`: which address of the interface."""
    cpus_per_task: int | None
    """`cluster.slurm.cpus_per_task`."""
    step_options: list[str]
    """Options of every srun."""
    node_start: list[str]
    """Command that precedes that of each node's ranks; empty without setup."""
    comment: str | None
    """`cluster.slurm.comment`."""
    checkpoint_bytes: int
    """Size of a checkpoint; 0 if unknown, or in an object store."""
    max_checkpoints: int
    """Checkpoints for which preflight wants room; 0 if unknown."""
    max_log_bytes: int
    """Size at which a log is continued in a new file; 0 for never."""
    planned_step_s: float | None
    """Seconds that the passes of a step take by the plan; None if it does not know the device."""
    container: list[str]
    """Options of srun for the container; empty without one."""
    environment: list[tuple[str, str, str]]
    """Name, value and reason of each variable that the script exports."""
    token: str = ""
    """Unique to one call of launch.slurm; its job has the same. Empty before that call."""

    def write(self, folder: Path) -> None:
        """Write it to the run folder."""
        (folder / FACTS).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "Submission":
        """Read it from a run folder. Raises OSError if it is missing, ConfigError if it is not valid."""
        path = folder / FACTS
        try:
            return Submission(**{**_ADDED, **json.loads(path.read_text(encoding="utf-8"))})
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path}: cannot be read ({error}): submit the run again with python -m launch.slurm"
            ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file such that neither a reader nor a kill ever sees half of it."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError:
        # What a full disk has of it.
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise

"""What a submitted run keeps in its folder, so that it can go on without the command that submitted it.

    submit.sbatch           the script; `sbatch` on it continues the run
    submit.yaml             the resolved configuration that every attempt trains
    submit.json             this module's `Submission`
    lock.json               the job that the folder belongs to, while there is one
    supervisor.log          what was decided, of all jobs
    attempts/<N>/           one start of the ranks: attempt.json, rank_<R>.log, node_<NODE>.log, srun.log, and
                            preflight.json with preflight.log if nodes were checked before
    attempts/latest         the newest of them

Imports the standard library only, as it also runs on nodes whose Python has nothing else.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

SCRIPT, CONFIG, FACTS = "submit.sbatch", "submit.yaml", "submit.json"
SUPERVISOR_LOG = "supervisor.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What supervision has to know of a run."""

    run: str
    """The run folder, absolute."""
    checkout: str
    """Folder of the code, absolute."""
    code: str
    """Commit of the code, and whether files differed from it."""
    python: str
    """Python that runs the ranks, as the nodes, or their container, find it."""
    num_steps: int
    """`train.steps`."""
    ranks_per_node: int
    legal_nodes: list[int]
    """Numbers of nodes that the run may have, ascending; the last is `cluster.nodes`."""
    spare_nodes: int
    """`cluster.slurm.spare_nodes`."""
    max_restarts: int
    """Restarts in a row that may get no further."""
    restart_wait_s: float
    """`cluster.slurm.restart_wait_s`."""
    stop_within_s: float
    """How long ranks may take to stop: within `cluster.slurm.stop_before_end_s`, so that the job can still go
    back to the queue before its time is over."""
    preflight: bool
    """`cluster.slurm.preflight`."""
    rendezvous_port: int
    """`cluster.slurm.rendezvous_port`."""
    interface: str | None
    """Network interface of the rendezvous; None is that of the host's name."""
    container: list[str]
    """Options of srun for the container; empty on bare nodes."""
    environment: list[tuple[str, str, str]]
    """Name, value and reason of the variables that the script exports."""

    def write(self, folder: Path) -> None:
        """Keep it in the run folder."""
        (folder / FACTS).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> "Submission":
        """That of a run folder. Raises OSError or ValueError if the file is absent or damaged, or another
        version's."""
        path = folder / FACTS
        try:
            return Submission(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: cannot be read ({error}): submit the run again with python -m launch.slurm"
            ) from error


def write_whole(path: Path, text: str) -> None:
    """Replace a file such that a reader, or a kill, never meets half of it."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, path)

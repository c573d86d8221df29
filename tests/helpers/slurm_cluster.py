"""A real SLURM on this machine: munged, slurmctld and a slurmd for each node, in a separate folder.

Nodes differ only by name and port, so their processes see each other; neither root nor a container is needed.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.helpers.project_sources import REPO
from tests.helpers.ranks import free_port
from tests.helpers.torchrun_jobs import living, strings

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
START_S = 30.0
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SlurmdDebug=debug
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdTimeout=10
KillWait={kill_wait_s}
ReturnToService=2
SwitchType=switch/none
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=10
"""


class Slurm:
    """A running cluster."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        """`folder` has the cluster's files; `env` makes SLURM's commands use it."""
        self.folder = folder
        self.env = dict(env)
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        """By name: munged, slurmctld, and the slurmd of each node under the node's name."""

    def start(self, name: str) -> None:
        """Start a daemon, or start it again after it was killed."""
        with (self.folder / f"{name}.out").open("a") as output:
            self.daemons[name] = subprocess.Popen(
                daemon_command(self.folder, name),
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent,
            )

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End a daemon, at the latest by SIGKILL; does nothing if it has ended."""
        process = self.daemons[name]
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def try_to(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command, however it ends."""
        return subprocess.run(
            command, env=self.env, cwd=REPO, capture_output=True, text=True, check=False, timeout=120
        )

    def ask(self, *command: str) -> str:
        """What a command prints. Raises AssertionError with its output if it fails."""
        done = self.try_to(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job_id: int) -> str:
        """The job's state, such as RUNNING."""
        return self.ask("squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%T").strip()

    def wait_until(self, happened: Callable[[], bool], timeout_s: float, logs: Path | None = None) -> None:
        """Return as soon as `happened()`. Raises AssertionError with SLURM's logs, and those in a folder."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            if time.monotonic() >= deadline:
                raise AssertionError(f"not within {timeout_s:g} s\n{self.logs(logs)}")
            time.sleep(0.1)

    def logs(self, more: Path | None = None) -> str:
        """The ends of all logs."""
        files = [*self.folder.glob("*.log"), *(more.rglob("*.log") if more else ())]
        return "\n".join(f"--- {path}\n" + "\n".join(tail(path, 40)) for path in sorted(files))

    def processes(self, mark: str) -> list[int]:
        """Living processes of which an argument contains this text."""
        return [pid for pid in living() if any(mark in text for text in strings(pid, "cmdline"))]

    def temporary_files(self) -> list[str]:
        """What jobs have left, apart from kernels that torch compiled, which the next start uses."""
        names = (path.name for path in (self.folder / "tmp").iterdir())
        return [name for name in names if not name.startswith("torchinductor_")]

    def slurmds(self, node: str) -> list[int]:
        """The daemon of a node of this cluster; another that runs may have a node of the same name."""
        own = f"SLURM_CONF={self.env['SLURM_CONF']}"
        daemons = [pid for pid in living() if strings(pid, "cmdline")[:4] == ["slurmd", "-D", "-N", node]]
        return [pid for pid in daemons if own in strings(pid, "environ")]


def tail(path: Path, num_lines: int) -> list[str]:
    """The last lines of a file."""
    return path.read_text(errors="replace").splitlines()[-num_lines:]


def require_slurm() -> None:
    """Skip where SLURM is not installed; fail where continuous integration should have installed it."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        text = f"not installed: {', '.join(missing)}; apt-get install slurm-wlm munge"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)


@contextmanager
def running_slurm(folder: Path, num_nodes: int = 2, kill_wait_s: int = 10) -> Iterator[Slurm]:
    """Start a cluster of nodes n1, n2, …; on exit, stop it with everything that it started.

    Processes have `kill_wait_s` from SIGTERM to SIGKILL.
    """
    require_slurm()
    write_files(folder, num_nodes, kill_wait_s)
    env = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
        "TMPDIR": str(folder / "tmp"),
    }
    cluster = Slurm(folder, env)
    with ExitStack() as stack:
        # Ended in reverse order; by then, no job is running.
        for name in ("munged", "slurmctld", *(f"n{number}" for number in range(1, num_nodes + 1))):
            cluster.start(name)
            stack.callback(cluster.end, name)
            if name == "munged":
                cluster.wait_until((folder / "munge/socket").exists, START_S)
        cluster.wait_until(lambda: all_idle(cluster, num_nodes), START_S)
        try:
            yield cluster
        finally:
            subprocess.run(["scancel", "--state=PENDING"], env=env, check=False)
            subprocess.run(["scancel", "--full", "--signal=KILL", "--state=RUNNING"], env=env, check=False)
            subprocess.run(["scancel", "--state=RUNNING"], env=env, check=False)
            cluster.wait_until(lambda: not cluster.ask("squeue", "--noheader").strip(), START_S)


def write_files(folder: Path, num_nodes: int, kill_wait_s: int) -> None:
    """Write configuration, key and folders."""
    host, user = os.uname().nodename, os.environ.get("USER") or "root"
    for name in ("munge", "state", "tmp", *(f"spool_n{number}" for number in range(1, num_nodes + 1))):
        (folder / name).mkdir(parents=True)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    nodes = "\n".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1 State=UNKNOWN"
        for number in range(1, num_nodes + 1)
    )
    facts = {"host": host, "user": user, "port": free_port(), "folder": folder, "nodes": nodes}
    conf = CONF.format(**facts, kill_wait_s=kill_wait_s)
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def all_idle(cluster: Slurm, num_nodes: int) -> bool:
    """Whether every node is up and idle."""
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"],
        env=cluster.env,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split() == ["idle"] * num_nodes


def end_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent dies (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def daemon_command(folder: Path, name: str) -> list[str]:
    """The command that runs a daemon in the foreground; it ends with this process if that is killed."""
    if name == "slurmctld":
        return ["slurmctld", "-D", "-i"]
    if name != "munged":
        return ["slurmd", "-D", "-N", name]
    munge = folder / "munge"
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    options = [f"--{option}={munge / file}" for option, file in files.items()]
    return ["munged", "--foreground", "--force", *options]

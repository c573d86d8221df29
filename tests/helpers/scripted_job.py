"""A SLURM job whose commands are scripts, for tests of what supervises and what asks SLURM."""

import os
import signal
import threading
from pathlib import Path

import pytest

from launch.preflight.findings import failed, passed
from launch.preflight.report import write_report
from launch.submission import Submission
from launch.supervisor import Supervisor

NUM_STEPS = 20
TOOLS = {
    "srun": """
case "$*" in *launch.rendezvous*)
    echo "$*" >> "$FAKE/rendezvous.calls"
    echo "welcome"; echo '{"address": "n1", "port": "29500"}'; exit 0;;
esac
case "$*" in *launch.preflight_rank*)
    echo "$*" >> "$FAKE/checks.calls"; exec sh "$FAKE/check_$(wc -l < "$FAKE/checks.calls")";;
esac
case "$*" in *launch.standby*) echo "$*" >> "$FAKE/standby.calls"; exec sh "$FAKE/standby";; esac
echo "$*" >> "$FAKE/srun.calls"
exec sh "$FAKE/behaviour_$(wc -l < "$FAKE/srun.calls")"
""",
    "sinfo": """
case "$*" in *--partition=main*) cat "$FAKE/others"; esac
cat "$FAKE/states" """,
    "squeue": 'cat "$FAKE/state"',
    "scontrol": """
case "$1 $2" in "show hostnames") echo "$3" | sed "s/n\\[5-6\\]/n5,n6/" | tr , "\\n"; exit;; esac
case "$*" in *" Comment="*) echo "$*" >> "$FAKE/comment.calls"; exit;; esac
case "$1 $2" in "show job") cat "$FAKE/job"; exit;; esac
echo "$*" >> "$FAKE/scontrol.calls" """,
}
WAIT_FOR_USR1 = "trap 'step 7; exit 0' USR1; step 6; touch {ready}; while :; do sleep 0.05; done"
"""Script of ranks that train a step, create a file, and save and stop on SIGUSR1."""


class ScriptedJob:
    """A job whose ranks behave as a test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """On nodes n1 to n4, all sound."""
        self.folder = folder
        self.run = folder / "run"
        self.run.mkdir()
        for name, script in TOOLS.items():
            (folder / "bin").mkdir(exist_ok=True)
            path = folder / "bin" / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE", str(folder))
        self.set_states()
        self.set_job_state("RUNNING")
        (folder / "others").touch()
        self.set_standby("exec sleep 600")
        (folder / "job").write_text("JobId=7 ExcNodeList=(null)\n")
        self.num_behaviours = self.num_checks = 0

    def set_states(self, **states: str) -> None:
        """What sinfo says of the nodes; those not named are allocated."""
        nodes = {f"n{number}": "allocated" for number in range(1, 5)} | states
        (self.folder / "states").write_text("".join(f"{node} {state}\n" for node, state in nodes.items()))

    def set_job_state(self, state: str) -> None:
        """What squeue says of the job."""
        (self.folder / "state").write_text(f"{state}\n")

    def set_standby(self, script: str) -> None:
        """What the step that watches over the supervisor does, as a shell script."""
        (self.folder / "standby").write_text(script + "\n")

    def then(self, script: str) -> None:
        """What the ranks of the next attempt do, as a shell script; `step N` writes metrics."""
        self.num_behaviours += 1
        function = f"""step() {{ echo "{{\\"step\\": $1}}" >> {self.run}/metrics.jsonl; }}\n"""
        (self.folder / f"behaviour_{self.num_behaviours}").write_text(function + script + "\n")

    def then_check(self, *unfit: str, status: int = 0) -> None:
        """What the next preflight finds: a missing GPU on these nodes. Without any nodes but with a status
        it ends without a report."""
        self.num_checks += 1
        lines = ["echo 'srun: error: n3: task 2: Exited with exit code 1' >&2"] if unfit or status else []
        if unfit or not status:
            findings = {node: [failed("gpus", "7 GPUs", "8 GPUs", "drain it")] for node in unfit}
            folder = self.folder / f"report_{self.num_checks}"
            write_report(folder, {"n0": [passed("gpus", "8 GPUs")], **findings}, {})
            lines.append(f"cp {folder}/preflight.json {self.run}/attempts/latest/preflight.json")
        script = "\n".join([*lines, f"exit {status}"])
        (self.folder / f"check_{self.num_checks}").write_text(script + "\n")

    def supervise(self, **changes: object) -> tuple[int, Supervisor]:
        """Run the supervisor to its end; its status and itself."""
        values: dict[str, object] = {
            "run": str(self.run), "checkout": str(self.folder), "code": "abc", "python": "python",
            "num_steps": NUM_STEPS, "ranks_per_node": 8, "legal_nodes": [2, 4], "spare_nodes": 0,
            "max_restarts": 3, "restart_wait_s": 0.0, "stop_within_s": 60.0, "preflight": False,
            "rendezvous_port": 29500, "interface": None, "container": [], "environment": [],
            "address_family": "ipv4", "cpus_per_task": None, "step_options": [], "node_start": [],
            "comment": None, "checkpoint_bytes": 0, "max_checkpoints": 0, "max_log_bytes": 0,
            "planned_step_s": None,
        }  # fmt: skip
        submission = Submission(**(values | changes))  # type: ignore[arg-type]
        job = Supervisor(submission, 7, ["n1", "n2", "n3", "n4"], "main")
        return job.run(), job

    def calls(self, tool: str) -> list[str]:
        """Arguments of each call; of scontrol, of those that change something."""
        log = self.folder / f"{tool}.calls"
        return log.read_text().splitlines() if log.exists() else []

    def outcomes(self, job: Supervisor) -> list[str | None]:
        """How the attempts ended."""
        return [attempt.outcome for attempt in job.attempts.history()]


def send_when(path: Path, number: signal.Signals) -> None:
    """SIGUSR1 or SIGTERM to this process as soon as a file is there."""

    def send() -> None:
        while not path.exists():
            threading.Event().wait(0.02)
        # After a test that failed before the supervisor handled it, it would end all tests.
        if callable(signal.getsignal(number)):
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()

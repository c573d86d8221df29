"""A Ray cluster as processes of this one: started, waited for, and gone whatever happens."""

import contextlib
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from launch.forwarding import end_with
from launch.output import log
from launch.ray.plan import START_S, TOKEN_FILE, Plan, Step, variables, without_ray
from launch.ray.ready import RayClusterError

POLL_S = 0.2
END_S = 20.0
"""Seconds that a step gets to end its nodes."""
TAIL = 15
"""Lines of the log that an error shows."""


@contextlib.contextmanager
def token_in(folder: Path) -> Iterator[Path]:
    """A file with a token that only this user can read, for as long as the context."""
    path = folder / TOKEN_FILE
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def running(plan: Plan, shell: Mapping[str, str], folder: Path, output: Path) -> Iterator["RayCluster"]:
    """A cluster for as long as the context.

    Args:
        plan: what it is made of.
        shell: variables of its processes, to which Ray's are added.
        folder: where the token is; all nodes see it.
        output: where its processes write.
    """
    with token_in(folder) as token:
        cluster = RayCluster(plan, without_ray(shell) | variables(str(token)), output)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.close()


class RayCluster:
    """Steps of Ray."""

    def __init__(self, plan: Plan, environment: Mapping[str, str], output: Path) -> None:
        """
        Args:
            plan: what it is made of.
            environment: variables of its processes.
            output: file that they append to.
        """
        self.environment = dict(environment)
        """What its users need as well."""
        self._plan = plan
        self._output = output
        self._running: list[tuple[Step, subprocess.Popen[bytes]]] = []
        self._is_closing = threading.Event()

    def start(self) -> None:
        """Start all steps, and say so when one ends before it should."""
        for step in self._plan.steps:
            process = self._open(step.command)
            self._running.append((step, process))
            threading.Thread(target=self._watch, args=(step, process), name="ray", daemon=True).start()

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Return once all nodes have joined, or `is_over()`.

        Raises `RayClusterError` with the end of the log if they do not, or the head ends.
        """
        ready, deadline = self._open(self._plan.ready), time.monotonic() + 2 * START_S
        try:
            while (status := ready.poll()) is None and not is_over():
                if self._running[0][1].poll() is not None or time.monotonic() > deadline:
                    status = 1
                    break
                time.sleep(POLL_S)
        finally:
            _end(ready)
        if status and not is_over():
            raise RayClusterError(f"Ray has not started on {self._plan.num_nodes} nodes:\n{self._tail()}")

    def close(self) -> None:
        """End all nodes, the head last, within a time."""
        self._is_closing.set()
        for _, process in reversed(self._running):
            _end(process)

    def _open(self, command: object) -> subprocess.Popen[bytes]:
        with self._output.open("ab") as output:
            return subprocess.Popen(
                command,  # type: ignore[call-overload]
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=lambda: end_with(signal.SIGTERM),
            )

    def _watch(self, step: Step, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._is_closing.is_set():
            log(
                f"Ray has ended on {step.name}, with status {status}: its rollouts go on elsewhere, if it can"
            )

    def _tail(self) -> str:
        try:
            lines = self._output.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            return f"{self._output}: {error}"
        return "\n".join(lines[-TAIL:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step: srun passes SIGTERM on to its tasks, which end Ray."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

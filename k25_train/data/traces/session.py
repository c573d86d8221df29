"""The tool `ipython`: a session in a child process that stays for many traces, one after another."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from PIL import Image

from k25_train.errors import DataError

FOLDER = "/mnt/data"
"""What the folder of the images is called in outputs; where it really is depends on the machine."""
TIMEOUT_S = 10.0
"""What a cell may take. Our choice."""
START_S = 120.0
"""What a process may take to start, on a busy machine. Our choice."""
HARD_TIMEOUTS = 2
"""Timeouts after which the process is ended, where a cell does not notice the first. Our choice."""
MAX_OUTPUT = 4_000
"""Characters of an output that are shown. Our choice."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a cell has printed."""

    text: str
    """With the value of its last expression or its traceback at the end."""
    failed: bool
    """Whether it raised an exception."""


class Session:
    """Runs cells for real. One process for all of its traces; a context manager."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._root = tempfile.TemporaryDirectory(prefix="k25-traces-")
        self._count = 0
        self._received = b""

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, images: Mapping[str, Image.Image]) -> None:
        """Begin a trace: no names, and a folder with these images alone.

        Raises DataError if no process starts.
        """
        self._count += 1
        folder = Path(self._root.name) / str(self._count)
        folder.mkdir()
        for name, image in images.items():
            image.save(folder / name)
        try:
            self._ask({"folder": str(folder)}, max(START_S, self._hard_limit_s))
        except _SilentError as error:
            self._end()
            raise DataError(
                f"a session of traces does not start: {error}. Look at its messages above."
            ) from error

    def run(self, code: str) -> Output:
        """What a cell prints. One that neither ends nor notices its timeout ends the session, until another
        trace begins: outputs say so."""
        if self._process is None:
            return Output("the session has ended", True)
        try:
            answer = self._ask({"code": code}, self._hard_limit_s)
        except _SilentError as error:
            self._end()
            return Output(f"the session has ended: {error}", True)
        text = str(answer["output"])
        if len(text) > MAX_OUTPUT:
            text = f"{text[:MAX_OUTPUT]}\n… {len(text) - MAX_OUTPUT} more characters"
        return Output(text, bool(answer["failed"]))

    def finish(self) -> None:
        """End a trace: its folder goes."""
        folder = Path(self._root.name) / str(self._count)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    def close(self) -> None:
        """End the process and remove what it worked on."""
        self._end()
        self._root.cleanup()

    @property
    def _hard_limit_s(self) -> float:
        return HARD_TIMEOUTS * self._timeout_s

    def _ask(self, asked: dict[str, str], limit_s: float) -> dict[str, object]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise _SilentError("its process is gone") from error
        while b"\n" not in self._received:
            if not select.select([process.stdout], [], [], limit_s)[0]:
                raise _SilentError(f"no answer within {limit_s:g} s")
            data = os.read(process.stdout.fileno(), 2**16)
            if not data:
                raise _SilentError("its process is gone")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, object] = json.loads(line)
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            script = Path(__file__).with_name("session_process.py")
            # Sets have the same order in every session, so that traces do not depend on it.
            environment = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            try:
                program = script.read_text(encoding="utf-8") + "\nmain()\n"
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", program, str(self._timeout_s), FOLDER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | environment,
                )
            except OSError as error:
                raise DataError(f"{script}: cannot be started ({error}), so no trace can be made.") from error
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process, self._received = None, b""


class _SilentError(Exception):
    """The session does not answer; the reason continues a sentence."""

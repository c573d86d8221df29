"""Standard output and error that survive any encoding, closed pipes and full disks."""

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from k25_train.errors import K25Error, MachineError

PLAIN = "k25-plain"
"""Name of the handler that writes other characters where an encoding lacks one."""
WIDTH_OF_FILES = 160
"""Characters of a table that no terminal shows. Our choice."""
_INSTEAD = {"…": "...", "×": "x", "→": "->", "—": "-", "\N{EN DASH}": "-", "’": "'", "·": ".", "•": "*"}


def table_width() -> int | None:
    """Characters that tables may have: None, for rich to ask for, on a terminal or where COLUMNS says it.

    In a file or a pipe rich takes 80, for which it cuts words off.
    """
    return None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH_OF_FILES


class ClosedPipeError(K25Error):
    """Nobody reads the output any more, as after `| head`."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_instead_of(character) for character in lost), error.end


def _instead_of(character: str) -> str:
    """Box drawing as `-`, `|` and `+`, a few signs as ASCII has them, anything else as an escape."""
    if "\u2500" <= character <= "\u257f":
        return "-" if character in "─━═╌╍┄┅┈┉╴╶╸╺" else "|" if character in "│┃║╎╏┆┇┊┋╵╷╹╻" else "+"
    if "\u2580" <= character <= "\u259f":
        return "#"
    return _INSTEAD.get(character, character.encode("ascii", "backslashreplace").decode())


codecs.register_error(PLAIN, _plain)


class Output:
    """A text stream like the one that it wraps, whose faults do not end what writes to it.

    A fault of `output` that a command exists to print ends the command: `ClosedPipeError` where nobody reads
    any more, `MachineError` otherwise. Where `goes_on`, it costs the lines and no more.
    """

    def __init__(self, stream: TextIO, name: str, *, goes_on: bool) -> None:
        self.stream = stream
        self.name = name
        self.goes_on = goes_on
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:
            self._fault(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Have what is buffered written, or drop it."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._fault(error)

    def _fault(self, error: OSError | ValueError) -> None:
        is_first, self.failed = not self.failed, True
        if not self.goes_on:
            if isinstance(error, BrokenPipeError):
                raise ClosedPipeError(f"{self.name} was closed") from error
            code = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
            raise MachineError(
                f"{self.name}: cannot be written: {error} [{code}]\n  -> make room, or write it elsewhere"
            ) from error
        if is_first and self.name == "stdout":
            print(f"stdout cannot be written ({error}); going on without it", file=sys.stderr)


def _point_at_nothing(stream: TextIO) -> None:
    """Have the descriptor of a process's own stream lead to nowhere, so that no later flush can fail."""
    if stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def tolerant_output(*, goes_on: bool) -> Iterator[None]:
    """Standard output and error as `Output`s, as long as this lasts; `goes_on` as there.

    Raises `MachineError` or `ClosedPipeError` at the end if output that matters was lost.
    """
    before = sys.stdout, sys.stderr
    streams = []
    for stream in before:
        # Python has None for a stream that was closed when it started.
        usable = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        if hasattr(usable, "reconfigure"):
            with contextlib.suppress(OSError, ValueError):
                usable.reconfigure(errors=PLAIN)
        streams.append(usable)
    output = Output(streams[0], "stdout", goes_on=goes_on)
    errors = Output(streams[1], "stderr", goes_on=True)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield
        output.flush()
    finally:
        for each in (output, errors):
            try:
                each.stream.flush()
            except (OSError, ValueError):
                _point_at_nothing(each.stream)
        sys.stdout, sys.stderr = before

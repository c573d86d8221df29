"""Files of a run folder as they are while others write them, or after a fault: cut short, damaged, missing.

Nothing here raises: what cannot be read is told as a trouble, and the rest is shown.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.progress import parse_row

MAX_BYTES = 4 << 20
"""Longest record or configuration that is read."""


class Reader:
    """Reads files, and remembers which could not be."""

    def __init__(self) -> None:
        self.troubles: list[str] = []
        """File and what is wrong with it, for people."""

    def end_of(self, path: Path, num_bytes: int) -> bytes:
        """The last bytes of a file; empty if there is none."""
        descriptor = -1
        try:
            # Opening a pipe would otherwise wait for its other end.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                self.troubles.append(f"{path}: is no file")
                return b""
            with os.fdopen(descriptor, "rb") as file:
                descriptor = -1
                file.seek(max(0, found.st_size - num_bytes))
                return file.read(num_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            self.troubles.append(f"{path}: cannot be read ({error.strerror or error})")
            return b""
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def object_in(self, path: Path) -> dict[str, Any]:
        """The JSON object in a file; empty if there is none."""
        text = self.end_of(path, MAX_BYTES)
        if not text:
            if modified_s(path) is not None:
                self.troubles.append(f"{path}: is empty")
            return {}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.troubles.append(f"{path}: is not JSON ({error})")
            return {}
        if not isinstance(found, dict):
            self.troubles.append(f"{path}: is no JSON object")
            return {}
        return found

    def names_in(self, folder: Path) -> list[str]:
        """Names in a folder, sorted; none if there is no such folder."""
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self.troubles.append(f"{folder}: cannot be read ({error.strerror or error})")
            return []

    def rows_from_the_end(self, path: Path, num_bytes: int) -> Iterator[dict[str, Any]]:
        """Rows of metrics in the last bytes of a file, newest first; other lines are passed over."""
        *lines, end = self.end_of(path, num_bytes).split(b"\n")
        num_damaged = 0
        for line in reversed([*lines, end]):
            row = parse_row(line)
            if row is not None:
                yield row
            elif line and line is not end and line is not lines[0]:
                num_damaged += 1
        if num_damaged:
            self.troubles.append(f"{path}: {num_damaged} of the newest lines are no rows")


def number(value: object) -> float | None:
    """A finite number; None for anything else, true and false included."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def modified_s(path: Path) -> float | None:
    """When a file or folder was last changed, in seconds since 1970; None if it cannot be seen."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None

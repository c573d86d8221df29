"""The toolset `python`: cells of an IPython kernel in the sandbox, variables and images included.

    Python ─► SandboxSession.start ─► kernel_driver.py ─► ipykernel, over ipc      all within the sandbox

Images that a cell shows (a PIL image as its last value, `display`, a figure of matplotlib) come back as image
parts. Source: K2.5, section 4.2, has image operations as IPython code; the tool is our choice. Options: none.
The sandbox needs ipykernel, and whatever cells import: bubblewrap shows this machine's packages, an image has
its own (extra `agents`).
"""

import base64
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k25_train.environments.environment import Tool
from k25_train.environments.sandboxes.base import Process, SandboxError
from k25_train.environments.toolsets import kernel_driver
from k25_train.environments.toolsets.base import Place, ToolResult, declared, wrong
from k25_train.environments.toolsets.options import ToolOptions

START_S = 60.0
"""Seconds in which a kernel has to be ready. Our choice; usually it is one."""
GRACE_S = 12.0
"""Seconds beyond a cell's limit in which the driver has to have interrupted it, or started again."""
MAX_ANSWER = 64 << 20
"""Characters of an answer of the driver: images and texts at their most."""
DRIVER = "/opt/k25/kernel_driver.py"
FILES = {DRIVER: Path(kernel_driver.__file__).read_bytes()}
"""What the sandbox of an attempt has to have."""
_EITHER = 'test -x "$0" && exec "$0" "$1"; exec python3 "$1"'
_COMMAND = ["/bin/sh", "-c", _EITHER, os.path.realpath(sys.executable), DRIVER]
"""With bubblewrap the very interpreter that the packages are for; in an image its own."""
PYTHON = declared(
    "python",
    "Run a cell in an IPython session that keeps its variables. Text that is printed, the last value, and "
    "images that are shown (PIL images, figures of matplotlib) come back.",
    {"code": {"type": "string", "description": "The cell."}},
    ("code",),
)


class Python:
    """See `Toolset`."""

    declarations: tuple[Tool, ...] = (PYTHON,)
    needs_sandbox = True
    is_replayable = False
    files = FILES

    async def open(self, place: Place) -> "_OpenPython":
        """See `Toolset`; the kernel is started by the first call."""
        return _OpenPython(place)


class _OpenPython:
    declarations = Python.declarations

    def __init__(self, place: Place) -> None:
        self._place = place
        self._driver: Process | None = None

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run a cell."""
        limit_s = self._place.services.tool_timeout_s
        order = {"code": arguments["code"], "seconds": limit_s}
        try:
            driver = self._driver or await self._start()
            if driver is None:
                return wrong("[no session can be started any more in what became of the sandbox]")
            await driver.write(json.dumps(order).encode() + b"\n")
            answer = await _message(driver, limit_s + GRACE_S)
        except TimeoutError:
            await self.close()
            return wrong("[the session did not answer any more and was started again: variables are gone]")
        except BaseException:
            # Cancelled in the middle, its next line would be this cell's.
            await self.close()
            raise
        if answer is None:
            await self.close()
            return wrong("[the session has ended and was started again: variables are gone]")
        return _told(answer, limit_s)

    async def _start(self) -> Process | None:
        """A driver that is ready; None if it cannot be started once the policy has acted, which may have
        taken all processes, or all room. Raises `SandboxError` if it cannot before."""
        driver = await self._place.session.start(_COMMAND)
        try:
            ready = await _message(driver, START_S)
        except TimeoutError:
            ready = None
        if not (ready or {}).get("ready"):
            await driver.close()
            if self._place.has_acted():
                return None
            raise SandboxError(
                f"{self._place.task}: no IPython kernel in its sandbox within {START_S:g} s. An image needs "
                "python3 with ipykernel and jupyter-client; bubblewrap shows this machine's (pip install "
                "'k25-train[agents]')"
            )
        self._driver = driver
        return driver

    async def close(self) -> None:
        """End the kernel."""
        driver, self._driver = self._driver, None
        if driver is not None:
            await driver.close()


async def _message(driver: Process, seconds: float) -> dict[str, Any] | None:
    """What the driver says next; None at its end, or for what is no message. Raises TimeoutError."""
    pieces: list[str] = []
    size = 0
    while line := await driver.read_line(seconds):
        piece = line.decode(errors="replace").rstrip("\n")
        pieces.append(piece[1:])
        size += len(piece)
        if piece[:1] == ".":
            break
        if piece[:1] != "+" or size > MAX_ANSWER:
            return None
    try:
        found = json.loads("".join(pieces))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _told(answer: Mapping[str, Any], limit_s: float) -> ToolResult:
    """What a cell has shown; whatever comes from within is untrusted."""
    try:
        text = "".join(map(str, answer["texts"])).rstrip("\n")
        media = tuple(base64.b64decode(image, validate=True) for image in answer["images"])
        fault = str(answer["fault"])
    except (KeyError, TypeError, ValueError):
        return wrong("[the session gave no answer that can be read]")
    ends = {
        "": "",
        "interrupted": f"[interrupted after {limit_s:g} s]",
        "restarted": "[the session ended and was started again: variables are gone]",
    }.get(fault, "")
    text = "\n".join(part for part in (text, ends) if part)
    return ToolResult(text=text or "[no output]", media=media, is_error=bool(ends))


def make_python(options: Mapping[str, Any]) -> Python:
    """It has no options."""
    ToolOptions("python", options).end()
    return Python()

"""Runs within a sandbox, as a file of its own: an IPython kernel, and what its cells show, as lines of JSON.

    python kernel_driver.py

    {"code": "1 + 1", "seconds": 10}                              a line in
    {"texts": ["2"], "images": ["iVBOR…"], "fault": ""}           lines out, in pieces of `PIECE` characters

A piece begins with `+` where more follow and with `.` where it is the last. The first message says that the
kernel is ready: `{"ready": true}`. `fault` is why a cell did not end: `interrupted`, or `restarted`, which
costs the variables. Needs ipykernel and jupyter-client where it runs.
"""

import base64
import json
import os
import queue
import re
import sys
import tempfile
import time
from typing import Any

PACKAGES = "/opt/site-packages"
"""Where a sandbox may have the packages of this machine."""
PIECE = 30_000
MAX_CHARACTERS = 100_000
"""Of all texts that a cell shows. Our choice."""
MAX_IMAGES = 8
"""That a cell shows. Our choice."""
MAX_IMAGE_BYTES = 4 << 20
_START_S = 60.0
_INTERRUPT_S = 3.0
"""Seconds that an interrupted cell gets to end, before the kernel is started again."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_IMAGES = ("image/png", "image/jpeg")


class Shown:
    """What a cell has shown so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images: list[str] = []
        self._room = MAX_CHARACTERS

    def say(self, text: str) -> None:
        """A text, as far as there is room."""
        if len(text) > self._room:
            text = text[: self._room] + "\n[cut off]" if self._room else ""
            self._room = 0
        else:
            self._room -= len(text)
        if text:
            self.texts.append(text)

    def take(self, kind: str, content: dict[str, Any]) -> None:
        """A message of the kernel."""
        if kind == "stream":
            self.say(content["text"])
        elif kind == "error":
            self.say(_ANSI.sub("", "\n".join(content["traceback"])))
        elif kind in ("execute_result", "display_data"):
            self._display(content["data"])

    def _display(self, data: dict[str, Any]) -> None:
        image = next((data[name] for name in _IMAGES if name in data), None)
        if image is None:
            self.say(data.get("text/plain", "") + "\n")
        elif len(self.images) >= MAX_IMAGES or len(image) > MAX_IMAGE_BYTES * 4 // 3:
            self.say(f"[an image is left out: at most {MAX_IMAGES} of {MAX_IMAGE_BYTES} bytes are shown]\n")
        else:
            self.say(f"[image {len(self.images) + 1}]\n")
            self.images.append(base64.b64encode(base64.b64decode(image)).decode())


class Kernel:
    """A kernel and its client."""

    def __init__(self) -> None:
        from jupyter_client.manager import KernelManager

        self._manager = KernelManager(transport="ipc", connection_file=os.path.join(_folder(), "kernel.json"))
        self._manager.start_kernel(extra_arguments=["--InteractiveShell.colors=nocolor"])
        self._client = self._manager.client()
        self._ready()

    def _ready(self) -> None:
        self._client.start_channels()
        self._client.wait_for_ready(timeout=_START_S)

    def run(self, code: str, seconds: float) -> dict[str, Any]:
        """Run a cell; what it has shown."""
        shown = Shown()
        asked = self._client.execute(code, allow_stdin=False)
        fault = ""
        if not self._listen(asked, time.monotonic() + seconds, shown):
            fault = "interrupted"
            self._manager.interrupt_kernel()
            if not self._listen(asked, time.monotonic() + _INTERRUPT_S, shown):
                fault = "restarted"
        if fault == "restarted" or not self._manager.is_alive():
            fault = "restarted"
            self._restart()
        return {"texts": shown.texts, "images": shown.images, "fault": fault}

    def _listen(self, asked: str, deadline: float, shown: Shown) -> bool:
        """Take in messages until the cell has ended; returns whether it has."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                message = self._client.get_iopub_msg(timeout=min(left, 1.0))
            except queue.Empty:
                if not self._manager.is_alive():
                    return True
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            content = message["content"]
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                return True
            shown.take(message["msg_type"], content)
        return False

    def _restart(self) -> None:
        self._client.stop_channels()
        self._manager.restart_kernel(now=True)
        self._client = self._manager.client()
        self._ready()


def _folder() -> str:
    """Where the kernel keeps its sockets: out of what the agent leaves, if that can be."""
    places = [place for place in ("/tmp", "/dev/shm") if os.access(place, os.W_OK)]
    folder = tempfile.mkdtemp(prefix="k25-kernel-", dir=places[0] if places else ".")
    for name in (
        "IPYTHONDIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "MPLCONFIGDIR",
    ):
        os.environ[name] = folder
    return folder


def send(message: dict[str, Any]) -> None:
    """A message, in pieces."""
    text = json.dumps(message)
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    for piece in pieces[:-1]:
        sys.stdout.write(f"+{piece}\n")
    sys.stdout.write(f".{pieces[-1]}\n")
    sys.stdout.flush()


def main() -> None:
    """See the head of this file."""
    if os.path.isdir(PACKAGES):
        sys.path.append(PACKAGES)
        os.environ["PYTHONPATH"] = PACKAGES
    kernel = Kernel()
    send({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        send(kernel.run(order["code"], order["seconds"]))


if __name__ == "__main__":
    main()

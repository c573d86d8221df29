"""What a rank does on SIGUSR2 in trials, by a `sitecustomize` that Python runs at its start."""

from __future__ import annotations

import os
from pathlib import Path

COMMAND = "command"
EXIT, FLOOD = "exit", "flood"
FLOOD_BYTES, FLOOD_S = 100_000_000, 15.0
"""How much a rank prints, and in which time."""
SOURCE = """
import os
import signal
import threading
import time


def flood():
    line = b"W a library warns in every call " + b"x" * 967 + b"\\n"
    for _ in range({flood_bytes} // 1_000_000):
        os.write(2, line * 1000)
        time.sleep(0.1)


def obey(*_):
    with open({command!r}) as file:
        command = file.read()
    if command == "exit":
        os._exit(0)
    threading.Thread(target=flood, daemon=True).start()


if "RANK" in os.environ:
    signal.signal(signal.SIGUSR2, obey)
"""


def install(folder: Path) -> dict[str, str]:
    """Write the hook below a trial's folder; returns the variables that load it."""
    place = folder / "hook"
    place.mkdir(parents=True)
    source = SOURCE.format(command=str(folder / COMMAND), flood_bytes=FLOOD_BYTES)
    (place / "sitecustomize.py").write_text(source)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH", "")]))}


def tell(folder: Path, command: str) -> None:
    """Say what the rank is to do that gets the signal next."""
    (folder / COMMAND).write_text(command)

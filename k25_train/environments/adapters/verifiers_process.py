"""What runs in the Python that has verifiers, started by file name; of ours it imports nothing.

    PYTHON verifiers_process.py tasks   CONFIG LIMIT          prints tasks, a line of JSON each
    PYTHON verifiers_process.py serve   CONFIG WORKERS MOST   prints the address, serves until its input ends

CONFIG: JSON of verifiers' `EnvConfig`. Source: verifiers 0.4, `v1/serve`; it has no command that serves.
"""

import importlib
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

SUPPORTED = "0.4."
"""Versions whose wire `verifiers_wire.py` speaks."""


def main(words: list[str]) -> int:
    """Run one command; the exit status."""
    version = importlib.import_module("verifiers").__version__
    if not version.startswith(SUPPORTED):
        sys.exit(f"verifiers {version} is installed, and {SUPPORTED}x is needed")
    command, config, *rest = words
    commands: dict[str, Callable[..., None]] = {"tasks": tasks, "serve": serve}
    commands[command](json.loads(config), *map(int, rest))
    return 0


def tasks(config: dict[str, Any], limit: int) -> None:
    """Print the first tasks of a taskset."""
    loaders = importlib.import_module("verifiers.v1.utils.loaders")
    taskset = loaders.load_taskset(loaders.resolve_env_config(config).taskset)
    for task in itertools.islice(taskset, limit):
        print(json.dumps({"key": task.key, "data": task.data.model_dump(mode="json")}))


def serve(config: dict[str, Any], workers: int, most: int) -> None:
    """Serve a taskset on a free port of this host."""
    # What is wrong with it is told at once.
    importlib.import_module("verifiers.v1.utils.loaders").resolve_env_config(config)
    threading.Thread(target=_end_with_input, daemon=True).start()
    importlib.import_module("verifiers.v1.serve.pool").serve_env(
        max_workers=workers,
        address="tcp://127.0.0.1:0",
        address_queue=_Printed(),
        elastic=True,
        config_data=config,
        max_concurrent=most,
    )


class _Printed:
    """What a queue is to the server: it puts its address here."""

    def put(self, address: str) -> None:
        """Tell it."""
        print(json.dumps({"address": address}), flush=True)


def _end_with_input() -> None:
    """End with whoever started it, however that one ended."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

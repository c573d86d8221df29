"""What torchrun starts as a rank of a submitted run: it trains, and all it prints goes to a file of its own.

python -m launch.rank ATTEMPT_FOLDER [arguments of k25_train.train]
"""

import os
import runpy
import signal
import sys
from pathlib import Path


def main() -> None:
    """Redirect, then become the training command."""
    folder, *arguments = sys.argv[1:]
    log = os.open(
        Path(folder) / f"rank_{os.environ['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    # The descriptors, not sys.stdout: NCCL and crashes in native code write there.
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    # launch.node left SIGTERM ignored; until the trainer listens to it, it has to end the rank.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv[1:] = arguments
    runpy.run_module("k25_train.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

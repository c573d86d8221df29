"""Started by torchrun as a rank of a submitted run: trains, with all its output in a separate file.

python -m launch.rank ATTEMPT_FOLDER [arguments of k25_train.train or k25_train.rl]
"""

import runpy
import signal
import sys
from pathlib import Path

from k25_train.entry import run_command
from launch import started_by
from launch.output import keep_limited, limit_of_environment, redirect
from launch.temporary import hold_own


def main() -> None:
    """Redirect, then become the training command."""
    run_command(_run, output_goes_on=True)


def _run() -> None:
    folder, *arguments = started_by.arguments("ATTEMPT_FOLDER ...")
    log = Path(folder) / f"rank_{started_by.number('RANK')}.log"
    redirect(log)
    keep_limited(log, limit_of_environment())
    hold_own()
    # launch.node left SIGTERM ignored; until the trainer handles it, it must end the rank.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv[1:] = arguments
    runpy.run_module("k25_train.any_run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

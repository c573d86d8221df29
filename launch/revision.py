"""Print which code this is.

python -m launch.revision
python -m launch.revision --record TEXT     for the build of an image: writes REVISION next to the code
"""

import sys
from pathlib import Path

from k25_train.entry import run_command
from k25_train.revision import code_version, record


def _run() -> None:
    checkout = Path(__file__).resolve().parent.parent
    if sys.argv[1:2] == ["--record"]:
        record(checkout, " ".join(sys.argv[2:]))
    print(code_version(checkout))


def main() -> None:
    """The command."""
    run_command(_run)


if __name__ == "__main__":
    main()

"""What shellcheck says of scripts."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def complaints(scripts: Sequence[Path]) -> str:
    """What shellcheck finds in the scripts; empty if all are sound.

    Skips the test where it is not installed; fails it where continuous integration should have installed it.
    """
    if shutil.which("shellcheck") is None:
        text = "shellcheck is not installed; apt-get install shellcheck"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""

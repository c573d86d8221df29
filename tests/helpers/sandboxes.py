"""Sandboxes with small limits, for tests on machines that have bubblewrap."""

import os
import shutil
import sys

import pytest

from k25_train.environments.sandboxes.command_line import Limits

LIMITS = Limits(
    wall_s=20.0,
    cpu_s=10,
    memory_bytes=128 << 20,
    disk_bytes=16 << 20,
    output_bytes=10_000,
    processes=32,
)
PYTHON = [os.path.realpath(sys.executable), "-I", "-S", "-c"]

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None and "CI" not in os.environ,
    reason="needs bubblewrap: apt-get install bubblewrap",
)

"""Every kind of fault, and how often it is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.helpers.faults import disks, files, processes, settings
from tests.helpers.faults.plans import Plan
from tests.helpers.faults.scenes import World


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault."""

    draw: Callable[[random.Random, World], Plan]
    weight: float


KINDS = {
    "kill": Kind(processes.draw_kill, 3),
    "stop": Kind(processes.draw_stop, 3),
    "pause": Kind(processes.draw_pause, 1),
    "full disk": Kind(disks.draw_full, 2),
    "read-only": Kind(disks.draw_read_only, 1.5),
    "unshared folder": Kind(disks.draw_unshared, 0.7),
    "run file": Kind(files.draw_run_file, 3),
    "data file": Kind(files.draw_data_file, 2),
    "removed": Kind(files.draw_removed, 2),
    "override": Kind(settings.draw_override, 2.5),
    "clock": Kind(settings.draw_clock, 1),
}
"""By name."""

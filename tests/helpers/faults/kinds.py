"""Every kind of fault, and how often it is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.helpers.faults import processes
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
}
"""By name."""

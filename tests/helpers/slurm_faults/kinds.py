"""Every kind of disturbance, by name."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.helpers.slurm_faults import daemons, files, processes, requests, submissions
from tests.helpers.slurm_faults.plans import Plan

KINDS: dict[str, Callable[[random.Random], Plan]] = {
    "rank killed": processes.rank_killed,
    "rank crashed": processes.rank_crashed,
    "rank frozen": processes.rank_frozen,
    "rank exits early": processes.rank_exits_early,
    "rank asked to stop": processes.rank_asked_to_stop,
    "log flood": processes.log_flood,
    "torchrun killed": processes.torchrun_killed,
    "step daemon killed": processes.step_daemon_killed,
    "node daemon killed": processes.node_daemon_killed,
    "node lost": processes.node_lost,
    "supervisor killed": processes.supervisor_killed,
    "frozen for a while": processes.supervisor_frozen,
    "node down": requests.node_taken,
    "node drained": requests.node_drained,
    "cancelled": requests.cancelled,
    "signalled": requests.signalled,
    "requeued": requests.requeued,
    "time limit": requests.time_limit_shortened,
    "suspended": requests.suspended,
    "preempted": requests.preempted,
    "controller away": daemons.controller_away,
    "authentication away": daemons.authentication_away,
    "disk full": files.disk_full,
    "read-only": files.read_only,
    "checkpoint truncated": files.checkpoint_truncated,
    "checkpoint flipped": files.checkpoint_flipped,
    "checkpoint incomplete": files.checkpoint_without_manifest,
    "record removed": files.record_removed,
    "metrics garbage": files.metrics_garbage,
    "launched twice": submissions.launched_twice,
    "queued twice": submissions.queued_twice,
    "queued as array": submissions.queued_as_array,
    "queued after": submissions.queued_after,
}


def plan_of(seed: int, only: str | None = None) -> tuple[str, Plan]:
    """Kind and disturbance of a seed. As many consecutive seeds as there are kinds have each kind once."""
    names = list(KINDS)
    random.Random(seed // len(names)).shuffle(names)
    kind = only or names[seed % len(names)]
    return kind, KINDS[kind](random.Random(seed))

"""What people and the scheduler ask of a job: to stop, to make way, to wait, to have less."""

from __future__ import annotations

import random
from functools import partial

from tests.helpers.slurm_faults.evidence import FINISHED, NODE_LOST, STOPPED, VANISHED
from tests.helpers.slurm_faults.judge import Expected
from tests.helpers.slurm_faults.plans import Plan, draw_spares, draw_step
from tests.helpers.slurm_faults.scene import Scene

SAVED = frozenset({STOPPED})
UNTOUCHED = frozenset({FINISHED})

ARRIVAL_S = 1.0
"""After which a request has reached everything that it is sent to."""


def cancelled(rng: random.Random) -> Plan:
    """The job is cancelled, with or without --full: it stays so until it is submitted again."""
    options = rng.choice([["--full"], []])
    return _request(
        rng,
        f"scancel {' '.join(options)}",
        ["scancel", *options],
        Expected(outcomes=SAVED | {VANISHED}, alone=False, max_steps_lost=6),
    )


def signalled(rng: random.Random) -> Plan:
    """The job is asked to save and stop, by each of the ways that reach other processes of it."""
    options = rng.choice([["--signal=USR1"], ["--signal=USR1", "--batch"], ["--signal=USR1", "--full"]])
    expected = Expected(outcomes=SAVED, told=("SIGUSR1|signal to its ranks",), max_steps_lost=0)
    return _request(rng, f"scancel {' '.join(options)}", ["scancel", *options], expected)


def requeued(rng: random.Random) -> Plan:
    """An administrator requeues the job."""
    expected = Expected(outcomes=SAVED | {VANISHED}, max_steps_lost=0)
    return _request(rng, "scontrol requeue", ["scontrol", "requeue"], expected)


def _request(rng: random.Random, text: str, command: list[str], expected: Expected) -> Plan:
    spares = draw_spares(rng)
    return Plan(
        text=f"{text}, {' '.join(spares)}",
        strike=partial(_ask, command=command),
        expected=expected,
        step=draw_step(rng),
        overrides=spares,
    )


def _ask(scene: Scene, *, command: list[str]) -> None:
    with scene.held(scene.node_of(1)):
        scene.note(None)
        scene.cluster.ask(*command, str(scene.job_id))
        scene.pause(ARRIVAL_S)


def time_limit_shortened(rng: random.Random) -> Plan:
    """The job's time is nearly over: it saves before. A rank is held until SLURM looks at time limits."""
    return Plan(
        text="TimeLimit in two minutes",
        strike=_shorten,
        expected=Expected(outcomes=SAVED, told=("SIGUSR1",), max_steps_lost=0, max_attempts=4),
        step=draw_step(rng),
        overrides=["cluster.slurm.stop_before_end_s=60"],
    )


def _shorten(scene: Scene) -> None:
    with scene.held(scene.node_of(1)):
        scene.note(None)
        # Over in a minute or two, and then enough for the next attempt.
        elapsed = scene.cluster.ask("squeue", "--noheader", f"--jobs={scene.job_id}", "--format=%M")
        limit_min = int(elapsed.strip().split(":")[-2]) + 2
        scene.cluster.ask("scontrol", "update", f"JobId={scene.job_id}", f"TimeLimit={limit_min}")
        scene.wait_until(lambda: "SIGUSR1" in scene.run.log)
        scene.cluster.ask("scontrol", "update", f"JobId={scene.job_id}", "TimeLimit=60")


def suspended(rng: random.Random) -> Plan:
    """The job is suspended for longer than a stall may take, and resumed: nobody is to blame."""
    pause_s = rng.choice([5, 25])
    return Plan(
        text=f"suspended for {pause_s} s, stall timeout 20 s",
        strike=partial(_suspend, pause_s=pause_s),
        expected=Expected(outcomes=UNTOUCHED, max_steps_lost=0, max_attempts=1),
        step=draw_step(rng),
        overrides=[*draw_spares(rng), "train.stall_timeout_s=20", "data.read_timeout_s=5"],
    )


def _suspend(scene: Scene, *, pause_s: float) -> None:
    scene.note(None)
    scene.cluster.ask("scontrol", "suspend", str(scene.job_id))
    scene.pause(pause_s)
    scene.cluster.ask("scontrol", "resume", str(scene.job_id))


def preempted(rng: random.Random) -> Plan:
    """A job of another partition needs the nodes."""
    return Plan(
        text="preempted by a job of all nodes",
        strike=_preempt,
        expected=Expected(outcomes=SAVED, max_steps_lost=0),
        step=draw_step(rng),
        overrides=draw_spares(rng),
    )


def _preempt(scene: Scene) -> None:
    scene.note(None)
    options = ["--partition=urgent", "--nodes=3", "--exclusive", f"--output={scene.folder}/urgent.log"]
    with scene.held(scene.node_of(1)):
        scene.cluster.ask("sbatch", "--parsable", *options, "--wrap=sleep 2")
        scene.wait_until(lambda: "ranks are asked to save" in scene.run.log)


def node_taken(rng: random.Random) -> Plan:
    """A node is set DOWN: the step on it ends, the job goes on. On the first node, SLURM kills the supervisor
    and takes the job for failed."""
    rank = rng.randrange(2)
    spares = rng.choice([["cluster.slurm.spare_nodes=1"], ["cluster.slurm.min_nodes=1"]])
    lost = frozenset({NODE_LOST, VANISHED, STOPPED})
    return Plan(
        text=f"State=DOWN of the node of rank {rank}, {' '.join(spares)}",
        strike=partial(_set_state, rank=rank, state="DOWN", stop=False),
        expected=Expected(
            outcomes=lost,
            told=(r"\b{node}\b",) if rank else (),
            alone=rank > 0,
            strikes_to_exclude=1,
            has_to_exclude=True,
        ),
        step=draw_step(rng),
        overrides=["cluster.slurm.min_nodes=1", *spares],
    )


def node_drained(rng: random.Random) -> Plan:
    """A node is drained: the job stays there until it stops, and then goes on without it."""
    rank, stop = rng.randrange(2), rng.random() < 0.7
    expected = Expected(
        outcomes=SAVED if stop else UNTOUCHED,
        strikes_to_exclude=1,
        has_to_exclude=stop,
        max_steps_lost=0,
        max_attempts=2 if stop else 1,
    )
    return Plan(
        text=f"State=DRAIN of the node of rank {rank}{', then SIGUSR1' if stop else ''}",
        strike=partial(_set_state, rank=rank, state="DRAIN", stop=stop),
        expected=expected,
        step=draw_step(rng),
        overrides=["cluster.slurm.min_nodes=1", f"cluster.slurm.spare_nodes={rng.randint(0, 1)}"],
    )


def _set_state(scene: Scene, *, rank: int, state: str, stop: bool) -> None:
    node = scene.node_of(rank)
    scene.note(node)
    scene.cluster.ask("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=trial")
    if stop:
        scene.cluster.ask("scancel", "--signal=USR1", str(scene.job_id))

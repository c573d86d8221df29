"""Disturbances of processes: ranks, what starts them, and what supervises them."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from functools import partial

from tests.helpers.slurm_faults.evidence import FAILED, FINISHED, INTERVAL, NODE_LOST, STOPPED, VANISHED
from tests.helpers.slurm_faults.hook import EXIT, FLOOD, FLOOD_BYTES, FLOOD_S, tell
from tests.helpers.slurm_faults.judge import Expected
from tests.helpers.slurm_faults.plans import Plan, can_replace, draw_spares, draw_step
from tests.helpers.slurm_faults.scene import MissedError, Scene
from tests.helpers.submitted_run import parent_of

HIT = frozenset({FAILED})
STALL = ["train.stall_timeout_s=25", "data.read_timeout_s=5"]
LOST = frozenset({NODE_LOST, FAILED, VANISHED})


def rank_killed(rng: random.Random) -> Plan:
    """SIGKILL of a rank."""
    return _of_rank(rng, "SIGKILL", partial(_signal_rank, number=signal.SIGKILL))


def rank_crashed(rng: random.Random) -> Plan:
    """SIGSEGV or SIGABRT of a rank."""
    number = rng.choice([signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
    return _of_rank(rng, number.name, partial(_signal_rank, number=number))


def rank_frozen(rng: random.Random) -> Plan:
    """SIGSTOP of a rank, which never goes on."""
    return _of_rank(rng, "SIGSTOP", partial(_signal_rank, number=signal.SIGSTOP), *STALL)


def rank_exits_early(rng: random.Random) -> Plan:
    """A rank ends in the middle of the run with status 0, as `sys.exit()` in a library does."""
    return _of_rank(rng, "exit with status 0", _exit_rank)


def torchrun_killed(rng: random.Random) -> Plan:
    """SIGKILL of the process that starts a node's ranks."""
    return _of_rank(rng, "SIGKILL of torchrun", _kill_torchrun)


def step_daemon_killed(rng: random.Random) -> Plan:
    """SIGKILL of SLURM's own process for a node's ranks."""
    return _of_rank(rng, "SIGKILL of slurmstepd", _kill_step)


def _of_rank(
    rng: random.Random,
    text: str,
    hit: Callable[[Scene, str], None],
    *more: str,
    outcomes: frozenset[str] = HIT,
) -> Plan:
    """The same node is hit once or twice."""
    rank, times, spares = rng.randrange(2), rng.choice([1, 1, 2]), draw_spares(rng)
    step = draw_step(rng, may_start=times == 1)
    return Plan(
        text=f"{text}, rank {rank}, {times} times, {' '.join(spares)}",
        strike=partial(_hit_node, rank=rank, hit=hit),
        expected=Expected(
            outcomes=outcomes,
            told=(r"\b{node}\b",),
            has_to_exclude=times == 2 and can_replace(spares),
            max_attempts=1 + times,
        ),
        step=step if times == 1 else min(step, INTERVAL + 2),
        num_strikes=times,
        overrides=[*spares, *more],
    )


def _hit_node(scene: Scene, *, rank: int, hit: Callable[[Scene, str], None]) -> None:
    node = scene.strikes[0].node if scene.strikes else scene.node_of(rank)
    assert node is not None
    if scene.attempt is None or node not in scene.attempt.nodes:
        raise MissedError(f"{node} is no longer in the run")
    scene.note(node)
    hit(scene, node)


def _rank_on(scene: Scene, node: str) -> int:
    scene.wait_until(lambda: node in scene.ranks())
    return scene.ranks()[node]


def _signal_rank(scene: Scene, node: str, *, number: signal.Signals) -> None:
    scene.kill(_rank_on(scene, node), number)


def _exit_rank(scene: Scene, node: str) -> None:
    tell(scene.folder, EXIT)
    scene.kill(_rank_on(scene, node), signal.SIGUSR2)


def _kill_torchrun(scene: Scene, node: str) -> None:
    scene.kill(scene.torchrun(node), signal.SIGKILL)


def _kill_step(scene: Scene, node: str) -> None:
    scene.wait_until(lambda: node in scene.ranks())
    scene.run.kill_step(node)


def rank_asked_to_stop(rng: random.Random) -> Plan:
    """A signal that asks to stop, to one rank alone: all of them save."""
    number, rank = rng.choice([signal.SIGTERM, signal.SIGUSR1]), rng.randrange(2)
    return Plan(
        text=f"{number.name} to rank {rank} alone",
        strike=partial(_hit_node, rank=rank, hit=partial(_signal_rank, number=number)),
        expected=Expected(outcomes=frozenset({STOPPED}), told=("a signal to its ranks",), max_steps_lost=0),
        step=draw_step(rng),
        overrides=draw_spares(rng),
    )


def node_daemon_killed(rng: random.Random) -> Plan:
    """SIGKILL of slurmd: the node stops responding, its processes go on."""
    rank = rng.randrange(2)
    return _of_node(rng, rank, "SIGKILL of slurmd", _kill_slurmd)


def _kill_slurmd(scene: Scene, node: str) -> None:
    """SLURM takes a while to notice."""
    scene.cluster.end(node, signal.SIGKILL)
    (other,) = {scene.node_of(0), scene.node_of(1)} - {node}
    with scene.held(other):
        command = ["sinfo", "--noheader", f"--nodes={node}", "--format=%T"]
        scene.wait_until(lambda: scene.cluster.ask(*command).startswith("down"), also_over=True)


def node_lost(rng: random.Random) -> Plan:
    """Everything of a node is gone at once."""
    return _of_node(rng, rng.randrange(2), "loss", _lose_node)


def _lose_node(scene: Scene, node: str) -> None:
    scene.wait_until(lambda: node in scene.ranks())
    supervisor = scene.supervisor()
    scene.run.lose_node(node)
    if scene.node_of(0) == node:
        # The batch host's own.
        step = parent_of(supervisor)
        scene.kill(step, signal.SIGKILL)
        scene.kill(supervisor, signal.SIGKILL)


def _of_node(rng: random.Random, rank: int, text: str, hit: Callable[[Scene, str], None]) -> Plan:
    # A run that needs both nodes would wait for the lost one.
    spares = rng.choice([["cluster.slurm.spare_nodes=1"], ["cluster.slurm.min_nodes=1"]])
    return Plan(
        text=f"{text} of the node of rank {rank}, {' '.join(spares)}",
        strike=partial(_hit_node, rank=rank, hit=hit),
        expected=Expected(
            outcomes=LOST,
            told=(r"\b{node}\b",) if rank else (),
            strikes_to_exclude=1,
            has_to_exclude=True,
            max_attempts=3,
        ),
        step=draw_step(rng),
        overrides=["cluster.slurm.min_nodes=1", *spares],
    )


def supervisor_killed(rng: random.Random) -> Plan:
    """SIGKILL of the supervisor; whoever submits the run again gets an account of it."""
    return Plan(
        text="SIGKILL",
        strike=partial(_signal_supervisor, number=signal.SIGKILL, pause_s=0.0),
        expected=Expected(outcomes=frozenset({VANISHED}), told=("supervisor ended before",), alone=False),
        step=draw_step(rng, may_start=True),
        overrides=draw_spares(rng),
    )


def supervisor_frozen(rng: random.Random) -> Plan:
    """SIGSTOP of the supervisor for a while, or of torchrun: the ranks do not notice."""
    pause_s, who = round(rng.uniform(1, 15), 1), rng.choice(["supervisor", "torchrun"])
    hit = _signal_supervisor if who == "supervisor" else _freeze_torchrun
    return Plan(
        text=f"SIGSTOP of {who} for {pause_s:g} s",
        strike=partial(hit, number=signal.SIGSTOP, pause_s=pause_s),
        expected=Expected(outcomes=frozenset({FINISHED}), max_steps_lost=0, max_attempts=1),
        step=draw_step(rng),
        overrides=draw_spares(rng),
    )


def _signal_supervisor(scene: Scene, *, number: signal.Signals, pause_s: float) -> None:
    pid = scene.supervisor()
    scene.note(None)
    scene.kill(pid, number)
    if pause_s:
        scene.pause(pause_s)
        scene.kill(pid, signal.SIGCONT)


def _freeze_torchrun(scene: Scene, *, number: signal.Signals, pause_s: float) -> None:
    scene.wait_for_ranks()
    pid = scene.torchrun(scene.node_of(1))
    scene.note(None)
    scene.kill(pid, number)
    scene.pause(pause_s)
    os.kill(pid, signal.SIGCONT)


def log_flood(rng: random.Random) -> Plan:
    """A rank prints 100 MB, as a library that warns in every call does: the logs stay small."""
    rank = rng.randrange(2)
    return Plan(
        text=f"rank {rank} prints {FLOOD_BYTES / 1e6:g} MB",
        strike=partial(_flood, rank=rank),
        expected=Expected(outcomes=frozenset({FINISHED}), max_steps_lost=0, max_attempts=1),
        step=draw_step(rng),
        finish=_measure_logs,
        overrides=["--max-log-mib=2"],
    )


def _flood(scene: Scene, *, rank: int) -> None:
    node = scene.node_of(rank)
    pid = _rank_on(scene, node)
    tell(scene.folder, FLOOD)
    scene.note(None)
    scene.kill(pid, signal.SIGUSR2)
    with scene.held(scene.node_of(1 - rank)):
        scene.pause(FLOOD_S)


def _measure_logs(scene: Scene) -> None:
    sizes = [path.stat().st_size for path in (scene.run.folder / "attempts/1").iterdir()]
    if sum(sizes) > FLOOD_BYTES / 2:
        scene.more.append(f"the attempt's logs have {sum(sizes) / 1e6:.0f} MB")

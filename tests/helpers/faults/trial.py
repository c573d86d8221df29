"""Trials: a run meets a planned fault, is restarted until it is done, and must equal one without it."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path

from k25_train.run_folder.rows_file import read_rows
from tests.helpers.faults.disks import unmount_below
from tests.helpers.faults.inventory import farthest, sound_steps
from tests.helpers.faults.plans import DONE, KILLED, NAMED, STOPPED, Plan, nothing
from tests.helpers.faults.scenes import (
    KEEP,
    LAYOUTS,
    NUM_STEPS,
    OTHER_LAYOUT,
    SAME_LAYOUT,
    TIMEOUT_S,
    Scene,
    World,
    small_run,
)
from tests.helpers.faults.small_jobs import JobSpec, Outcome, SmallJob
from tests.helpers.interrupted_runs import without_times

MAX_RESTARTS = 3
USER_ERROR, INTERRUPTED = 2, 128 + signal.SIGINT
"""Exit statuses of an error that names what is wrong, and of what Ctrl-C has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one trial."""

    plan: Plan
    way: str
    """How the job with the fault ended."""
    problems: tuple[str, ...]
    """What was not right; empty if all was."""
    output: str
    """What the jobs printed."""


def run_trial(world: World, plan: Plan, folder: Path, timeout_s: float = TIMEOUT_S) -> Verdict:
    """Do what is planned in an empty `folder`, and judge it."""
    scene = Scene(world=world, folder=folder, layout=plan.layout, started_at=plan.started_at)
    scene.prepare()
    try:
        plan.prepare(scene)
        return _judged(scene, plan, timeout_s)
    finally:
        unmount_below(folder)


def _judged(scene: Scene, plan: Plan, timeout_s: float) -> Verdict:
    before = sound_steps(scene.run, scene.reference.folder)
    # 1. The job with the fault.
    seen: list[set[int]] = [before]

    def strike(job: SmallJob) -> None:
        plan.strike(scene, job)
        seen.append(sound_steps(scene.run, scene.reference.folder))

    outcome = start(scene, plan, timeout_s).run(strike, timeout_s)
    outputs = [outcome.output]
    way, problems = way_of(outcome), problems_of(outcome, plan)
    # What the fault itself has destroyed is no loss: what counts is what was there right after it.
    problems += lost(seen[-1], sound_steps(scene.run, scene.reference.folder), plan.num_kept)
    # 2. Restarts without it, until the run is done.
    done = way == DONE
    if not done:
        plan.repair(scene)
    calm = replace(
        plan,
        moment=None,
        strike=nothing,
        overrides=(),
        layout=plan.end_layout or plan.layout,
        folders=(),
        is_relative=False,
        environment={},
    )
    if plan.ends_there and way == NAMED:
        return Verdict(plan=plan, way=way, problems=tuple(problems), output=outcome.output)
    while not done and len(outputs) <= MAX_RESTARTS and not problems:
        kept = sound_steps(scene.run, scene.reference.folder, weights_tolerance_of(plan))
        outcome = start(scene, calm, timeout_s).run(nothing, timeout_s)
        outputs.append(outcome.output)
        done = way_of(outcome) == DONE
        problems += problems_of(outcome, replace(calm, ends=frozenset({DONE})))
        problems += lost(kept, sound_steps(scene.run, scene.reference.folder, weights_tolerance_of(plan)))
    # 3. The end is the uninterrupted run's.
    if not problems:
        problems += differences(scene, plan, "".join(outputs))
    return Verdict(plan=plan, way=way, problems=tuple(problems), output="\n--- restart\n".join(outputs))


def start(scene: Scene, plan: Plan, timeout_s: float) -> SmallJob:
    """Start the run in the scene."""
    num_ranks, _ = LAYOUTS[plan.layout]
    run = Path("run") if plan.is_relative else scene.run
    folders = [scene.folder / name for name in plan.folders] or [scene.folder] * num_ranks
    scene.num_jobs += 1
    return SmallJob(
        JobSpec(
            arguments=[*small_run(scene.data, run, plan.layout), *plan.overrides],
            num_ranks=num_ranks,
            scratch=scene.folder / f"job_{scene.num_jobs}",
            run=run,
            folders=folders,
            moment=plan.moment,
            plant=plan.plant,
            environment=plan.environment,
        )
    )


def way_of(outcome: Outcome) -> str:
    """How a job ended."""
    if all(status == 0 for status in outcome.statuses):
        return STOPPED if "the same command goes on from there" in outcome.output else DONE
    # A rank that is told an error may end the others before they have heard of it.
    if USER_ERROR in outcome.statuses:
        return NAMED
    return (
        KILLED
        if any(status < 0 or status == INTERRUPTED for status in outcome.statuses)
        else f"status {outcome.statuses}"
    )


def problems_of(outcome: Outcome, plan: Plan) -> list[str]:
    """What is wrong with how a job ended."""
    problems = []
    if outcome.is_hung:
        problems.append("it hangs")
    if outcome.leftovers:
        problems.append(f"processes are left: {outcome.leftovers}")
    way = way_of(outcome)
    if way not in plan.ends:
        problems.append(f"it ended with: {way} {outcome.statuses}: {last_line(outcome.output)}")
    # Who loses a peer that was killed cannot know why.
    was_killed = -signal.SIGKILL in outcome.statuses
    if "Traceback (most recent call last)" in outcome.output and not was_killed:
        problems.append(f"a traceback: {last_line(outcome.output)}")
    return problems


def lost(before: set[int], after: set[int], num_kept: int = KEEP) -> list[str]:
    """Sound checkpoints that should still be there: the newest ones, as many as are kept."""
    missing = sorted(set(sorted(before | after)[-num_kept:]) - after)
    return [f"sound checkpoints are lost: {missing}; before {sorted(before)}, after {sorted(after)}"] * bool(
        missing
    )


def differences(scene: Scene, plan: Plan, output: str) -> list[str]:
    """In what the finished run differs from the uninterrupted one."""
    problems = []
    if NUM_STEPS not in sound_steps(scene.run, scene.reference.folder, weights_tolerance_of(plan)):
        place = f"checkpoints/step_{NUM_STEPS}"
        distance, name = farthest(
            scene.run / place, scene.reference.folder / place, weights_tolerance_of(plan)
        )
        problems.append(
            f"the last checkpoint is not the uninterrupted run's: {name} differs by {distance:.2g}"
        )
    found = {row["step"]: row for row in without_times(read_rows(scene.run / "metrics.jsonl"))}
    for row in scene.reference.rows[plan.first_row :]:
        other = found.get(row["step"])
        if other is None and not plan.may_lose_rows and "metrics.jsonl" not in output:
            problems.append(f"the row of step {row['step']} is missing")
        elif other is not None and not _close(other, row, tolerance_of(plan)):
            problems.append(f"the row of step {row['step']} differs: {other} instead of {row}")
    left = [path.name for path in scene.checkpoints.iterdir() if not path.name.startswith("step_")]
    left += [path.name for path in scene.checkpoints.iterdir() if path.suffix]
    left += [path.name for path in scene.run.iterdir() if path.name.startswith("lock")]
    ends = (".partial", ".tmp")
    return problems + [
        f"left behind: {name}" for name in left if name.endswith(ends) or name.startswith("lock")
    ]


def tolerance_of(plan: Plan) -> float:
    """Largest relative difference from the uninterrupted run."""
    return SAME_LAYOUT if plan.end_layout in (None, plan.layout) else OTHER_LAYOUT


def weights_tolerance_of(plan: Plan) -> float:
    """Largest relative difference of weights and moments. Adam turns a gradient that is little more than the
    noise of rounding, which differs between layouts, into steps as large as any."""
    return 10 * tolerance_of(plan)


def _close(found: object, wanted: object, tolerance: float) -> bool:
    if not tolerance:
        return found == wanted
    assert isinstance(found, dict)
    assert isinstance(wanted, dict)
    keys = ("loss", "grad_norm")
    return all(abs(found[key] - wanted[key]) <= tolerance * abs(wanted[key]) for key in keys if key in wanted)


def last_line(output: str) -> str:
    """The last line that is not blank, for a summary."""
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was printed"

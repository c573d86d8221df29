"""Trials: a run is disturbed, left to recover, continued by one `sbatch` if it has to be, and judged."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k25_train.run_folder.rows_file import read_rows
from tests.helpers.interrupted_runs import without_times
from tests.helpers.slurm_faults import hook
from tests.helpers.slurm_faults.evidence import Evidence, steps_lost
from tests.helpers.slurm_faults.files import mount_small_disk, unmount_below
from tests.helpers.slurm_faults.judge import problems_of
from tests.helpers.slurm_faults.plans import STARTING, Plan
from tests.helpers.slurm_faults.scene import MissedError, Scene
from tests.helpers.slurm_faults.site import Site, World

GRACE_S = 15.0
"""How long processes and jobs may take to go when the run is over."""

CACHE = "torchinductor_"
"""What torch compiles is kept for all later processes of a user, in one folder of this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one trial."""

    problems: Sequence[str]
    """What was not right; empty if all was."""
    recovered: str
    """How the run came to its end."""
    steps_lost: int
    evidence: Evidence | None
    log: str
    """What to look at if something was not right."""


def run_trial(site: Site, world: World, plan: Plan, folder: Path, keep: Path | None = None) -> Verdict:
    """Do what is planned to a run below a new folder, and judge it; if something is wrong, the run folder is
    copied to `keep`."""
    site.renew()
    for path in site.temporary.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shared_memory = site.shared_memory()
    site.cluster.env |= hook.install(folder)
    if plan.small_disk:
        mount_small_disk(folder / "run")
    try:
        scene = Scene(site, world.data, folder, plan.overrides)
        missed = disturb(scene, plan)
        continued_from = recover(scene, plan)
        evidence = found(scene, continued_from, missed, shared_memory)
        problems = problems_of(plan.expected, evidence, plan.num_strikes, world.rows)
        if problems and keep is not None:
            shutil.copytree(scene.run.folder, keep, symlinks=True, dirs_exist_ok=True)
        return Verdict(
            problems=problems,
            recovered="alone" if continued_from is None else f"by sbatch, from {continued_from}",
            steps_lost=steps_lost(evidence),
            evidence=evidence,
            log=site.cluster.logs(scene.run.folder) if problems else "",
        )
    finally:
        site.end_jobs(str(folder))
        unmount_below(folder)


def disturb(scene: Scene, plan: Plan) -> list[str]:
    """Strike as often as planned; returns what went wrong with that."""
    try:
        plan.prepare(scene)
        for number in range(1, plan.num_strikes + 1):
            # The next strike comes when the next attempt has got further.
            step = plan.step if number == 1 else max(plan.step, scene.strikes[-1].step) + 2
            if step == STARTING:
                scene.wait_for_ranks()
            else:
                scene.wait_for_step(step, number)
            plan.strike(scene)
    except (MissedError, AssertionError, subprocess.SubprocessError) as error:
        return [f"the disturbance failed: {error}"]
    return []


def recover(scene: Scene, plan: Plan) -> str | None:
    """Wait for the end, helping once if that is needed; returns the state in which the run needed it."""
    needed_in = None
    try:
        state = scene.wait_for_end()
        if state != "COMPLETED":
            needed_in = state
            plan.repair(scene)
            scene.site.repair()
            if scene.is_held:
                # SLURM itself holds a job that could not be launched; only a release brings it back.
                needed_in = f"{state} (held)"
                scene.cluster.ask("scontrol", "release", str(scene.job_id))
                scene.state = ""
            else:
                scene.follow(scene.submit_again())
            scene.wait_for_end()
        plan.finish(scene)
    except (MissedError, AssertionError, subprocess.SubprocessError) as error:
        scene.more.append(str(error))
    return needed_in


def found(scene: Scene, continued_from: str | None, missed: list[str], shared_memory: set[str]) -> Evidence:
    """Collect what is left of a run that is over."""
    scene.wait_within(lambda: not leftovers(scene, shared_memory), GRACE_S)
    attempts, log = scene.attempts(), scene.run.log
    lines = [line for line in log.splitlines() if " starts on " not in line]
    try:
        rows = without_times(read_rows(scene.run.folder / "metrics.jsonl"))
    except (OSError, ValueError) as error:
        rows = []
        missed = [*missed, f"metrics.jsonl cannot be read: {error}"]
    resumed = {attempt.number: resumed_after(scene.run.folder, attempt.number) for attempt in attempts}
    return Evidence(
        strikes=scene.strikes,
        attempts=attempts,
        state=scene.state,
        continued_from=continued_from,
        words="\n".join([*lines, *(attempt.reason for attempt in attempts), *scene.comments]),
        rows=rows,
        resumed={number: step for number, step in resumed.items() if step is not None},
        allocated=scene.allocated,
        excluded=scene.excluded(),
        left=leftovers(scene, shared_memory),
        more=[*missed, *scene.more],
    )


def resumed_after(run: Path, attempt: int) -> int | None:
    """After which step an attempt went on; None if it trained nothing."""
    path = run / f"attempts/{attempt}/rank_0.log"
    text = path.read_text(errors="replace") if path.exists() else ""
    match = re.search(r"resuming after step (\d+) of", text)
    if match is not None:
        return int(match[1])
    return 0 if re.search(r"step +\d+/\d+", text) else None


def leftovers(scene: Scene, shared_memory: set[str]) -> list[str]:
    """What a run that is over should not leave."""
    run, site = scene.run.folder, scene.site
    left = [f"process {pid}: {what}" for pid, what in scene.processes().items()]
    left += [
        f"job {job}" for job in scene.cluster.try_to("squeue", "--noheader", "--format=%A").stdout.split()
    ]
    left += [f"/dev/shm/{name}" for name in sorted(site.shared_memory() - shared_memory)]
    names = sorted(path.name for path in site.temporary.iterdir())
    left += [f"$TMPDIR/{name}" for name in names if not name.startswith(CACHE)]
    patterns = (
        "checkpoints/*.partial",
        "lock*",
        "**/*.tmp",
        "attempts/latest.*",
        "*.json.*",
        "attempts/*/*.json.*",
    )
    return left + [str(path.relative_to(run)) for pattern in patterns for path in sorted(run.glob(pattern))]

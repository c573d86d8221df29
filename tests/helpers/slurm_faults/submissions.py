"""The same run is submitted again while it runs, in every way that SLURM has."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from functools import partial

from tests.helpers.slurm_faults.evidence import FINISHED
from tests.helpers.slurm_faults.judge import Expected
from tests.helpers.slurm_faults.plans import Plan, draw_step
from tests.helpers.slurm_faults.scene import Scene

UNTOUCHED = Expected(outcomes=frozenset({FINISHED}), max_steps_lost=0, max_attempts=1)
SETTINGS = ("submit.yaml", "submit.json", "submit.sbatch", "config.yaml")
END_S = 120.0
"""Most seconds that the others' jobs may take to end when the run is over."""


def launched_twice(rng: random.Random) -> Plan:
    """Two more people submit it at once, with other settings."""
    return Plan(
        text="two more of launch.slurm", strike=_launch_twice, expected=UNTOUCHED, step=draw_step(rng)
    )


def _launch_twice(scene: Scene) -> None:
    before = {name: (scene.run.folder / name).read_bytes() for name in SETTINGS}
    jobs = jobs_of(scene)
    scene.note(None)
    others = [
        subprocess.Popen(
            scene.launch(f"optim.lr={rate}"),
            env=scene.cluster.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rate in ("4e-3", "6e-3")
    ]
    for other in others:
        printed, errors = other.communicate(timeout=END_S)
        if other.returncode != 2 or f"belongs to job {scene.job_id}" not in errors:
            scene.more.append(f"not refused: status {other.returncode}, {(errors or printed)[-200:]}")
    changed = [name for name, content in before.items() if (scene.run.folder / name).read_bytes() != content]
    if changed:
        scene.more.append(f"a refused submission changed {', '.join(changed)}")
    if jobs_of(scene) - jobs:
        scene.more.append(f"a refused submission left jobs {sorted(jobs_of(scene) - jobs)}")


def jobs_of(scene: Scene) -> set[str]:
    """All jobs of the cluster that have not ended."""
    return set(scene.cluster.ask("squeue", "--noheader", "--format=%A").split())


def queued_twice(rng: random.Random) -> Plan:
    """`sbatch` of the run's script, twice."""
    return _queued(rng, [], [])


def queued_as_array(rng: random.Random) -> Plan:
    """`sbatch --array` of the run's script."""
    return _queued(rng, ["--array=1-3"])


def queued_after(rng: random.Random) -> Plan:
    """`sbatch` of the run's script, to begin when the run is over."""
    return _queued(rng, ["--dependency=afterany:JOB"])


def _queued(rng: random.Random, *submissions: Sequence[str]) -> Plan:
    texts = [" ".join(["sbatch", *options, "submit.sbatch"]) for options in submissions]
    return Plan(
        text=", ".join(texts),
        strike=partial(_queue, submissions=submissions),
        expected=UNTOUCHED,
        step=draw_step(rng),
        finish=_see_others_end,
    )


def _queue(scene: Scene, *, submissions: Sequence[Sequence[str]]) -> None:
    scene.note(None)
    for options in submissions:
        scene.submit_again(*(option.replace("JOB", str(scene.job_id)) for option in options))


def _see_others_end(scene: Scene) -> None:
    """The others' jobs come when the run is finished: they end soon, and start no ranks."""
    scene.wait_within(lambda: not jobs_of(scene), END_S)

"""Runs the stages of a chain one after another, each as a job of its own; what is finished is skipped.

    for each stage:   last checkpoint there?  ── yes ─► skipped, if its settings are those of the chain
                      │ no
                      ▼
                      python -m launch.torchrun experiment=… checkpoint.init_from=…     (resumes where it was)

A run resumes from its own checkpoints to the same losses, so a chain that was killed anywhere goes on where
it was when it is started again.
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from k25_train.checkpoint import folders
from k25_train.checkpoint.continuity import saved_config
from k25_train.checkpoint.storage.places import place_of
from k25_train.config.leaves import leaves, plain_values
from k25_train.errors import ConfigError, K25Error
from k25_train.recipes.composed import Composed
from k25_train.recipes.jobs import run_job
from k25_train.run_folder.lock import current
from k25_train.run_folder.process import Liveness, liveness
from k25_train.run_folder.record import LockedError

Say = Callable[[str], None]
WITHOUT_EFFECT = (
    "run",
    "cluster",
    "parallelism",
    "derived",
    "metrics",
    "checkpoint.keep",
    "activation",
    "dep",
)
"""Keys that a finished stage may have otherwise: the model that it trained is the same."""
WAIT_FOR_END_S = 120.0
"""How long ranks of a chain that was killed may take to save and end. Our choice."""
_MOST_TOLD = 6
_NOTHING = object()
"""In the place of a setting that is not there."""


class StageError(K25Error):
    """A stage of a chain has failed."""


def is_finished(stage: Composed) -> bool:
    """Whether the checkpoint of the last step is there and whole."""
    folder = place_of(stage.last_checkpoint)
    return folder.exists() and folders.is_whole(folder)


def check_order(stages: Sequence[Composed]) -> None:
    """Raise ConfigError if a stage is finished though one that it starts from is not: it started from what is
    no longer there; or if a finished one was trained with other settings than the chain now has."""
    finished = {each.stage.name: is_finished(each) for each in stages}
    for each in stages:
        name = each.stage.name
        if not finished[name]:
            continue
        lost = [source for source in each.stage.sources.values() if finished.get(source) is False]
        if lost:
            raise ConfigError(
                f"stage {name} is finished, but {lost[0]}, which it starts from, is not: train it, and all "
                f"that follows, again with --from {lost[0]}"
            )
        if changed := _changed(each):
            raise ConfigError(
                "\n  ".join([f"stage {name} is finished, but was trained with other settings:", *changed])
                + f"\n  -> take them back, or train it, and all that follows, again with --from {name}"
            )


def remove_from(stages: Sequence[Composed], first: str, say: Say) -> None:
    """Remove the run folders of a stage and of all that follow. Raises ConfigError for an unknown stage, and
    where checkpoints are elsewhere: a run would go on from them."""
    names = [each.stage.name for each in stages]
    if first not in names:
        raise ConfigError(f"--from {first}: is not a stage\n  -> use one of {', '.join(names)}")
    removed = stages[names.index(first) :]
    for each in removed:
        if (folder := each.config.checkpoint.dir) is not None:
            raise ConfigError(
                f"--from {first}: checkpoints of {each.stage.name} are in checkpoint.dir={folder}, which is "
                "not removed\n  -> remove them, and the run folder, and leave --from out"
            )
    for each in removed:
        run_folder = Path(each.config.run.dir)
        if run_folder.exists():
            say(f"{each.stage.name}: removing {run_folder}")
            shutil.rmtree(run_folder)


def run_stage(stage: Composed, number: int, total: int, say: Say) -> bool:
    """Train a stage to its end, unless it is there already; returns whether it was trained.

    Raises StageError if the job fails, or was stopped by a signal before its end.
    """
    title = f"stage {number}/{total} {stage.stage.name}"
    if is_finished(stage):
        say(f"{title}: done already, {stage.last_checkpoint}")
        return False
    folder = Path(stage.config.run.dir)
    wait_for_end(folder, say)
    state = "goes on" if (folder / "checkpoints").exists() else "starts"
    say(f"{title}: {state}, {stage.config.train.steps} steps, {stage.num_tokens:,} tokens")
    started_s = time.monotonic()
    status = run_job(command_of(stage))
    if status or not is_finished(stage):
        what = f"failed with status {status}" if status else "was stopped before its last step"
        raise StageError(
            f"stage {stage.stage.name} {what}; its messages are above and in {folder}\n"
            "  -> the same command goes on from its newest checkpoint"
        )
    say(f"{title}: done in {time.monotonic() - started_s:.0f} s")
    return True


def command_of(stage: Composed) -> list[str]:
    """The command that trains a stage on this machine."""
    return [sys.executable, "-m", "launch.torchrun", *stage.arguments]


def wait_for_end(folder: Path, say: Say) -> None:
    """Wait until ranks of a chain that was killed have saved and ended. Raises StageError if they do not."""
    deadline = time.monotonic() + WAIT_FOR_END_S
    told = False
    while _is_held(folder):
        if time.monotonic() > deadline:
            raise StageError(f"{folder} is held by another run: wait for its end, or stop it")
        if not told:
            say(f"{folder}: waiting for the run that holds it")
        told = True
        time.sleep(0.5)


def _is_held(folder: Path) -> bool:
    try:
        holder = current(folder) if folder.exists() else None
    except LockedError:
        return False
    process = None if holder is None else holder.process
    return process is not None and liveness(process) is Liveness.alive


def _changed(stage: Composed) -> list[str]:
    """Settings that the finished stage was trained with, and the chain's."""
    saved = dict(leaves(saved_config(place_of(stage.last_checkpoint) / folders.CONFIG)))
    values = plain_values(stage.config)
    now = dict(leaves(values))
    # What has a name of its own, such as a source, may be on one side only.
    keys = [*now, *(key for key in saved if key not in now and key.split(".")[0] in values)]
    return [
        f"{key}={saved.get(key, 'nothing')} then, {now.get(key, 'nothing')} now"
        for key in keys
        if saved.get(key, _NOTHING) != now.get(key, _NOTHING) and not _has_no_effect(key)
    ][:_MOST_TOLD]


def _has_no_effect(key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in WITHOUT_EFFECT)

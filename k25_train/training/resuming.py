"""From where a run goes on: its newest checkpoint, shared or on the nodes' own disks, or the beginning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k25_train.checkpoint import folders
from k25_train.checkpoint.agreement import on_first_rank
from k25_train.checkpoint.checking import check_same_run, losses_before, notes_on
from k25_train.checkpoint.data_state import DataState, mixture_of
from k25_train.checkpoint.initial import origin_of
from k25_train.checkpoint.loading import load
from k25_train.checkpoint.storage.kinds import Place
from k25_train.errors import CheckpointError, ConfigError
from k25_train.metrics.report import Report
from k25_train.training.beginning import go_on_with_data, start_from_files
from k25_train.training.local_checkpoints import NoLocalCheckpoints
from k25_train.training.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run begins with, apart from weights and optimizer state, which it has by now."""

    step: int
    """The last step that is in them; 0 for a new run."""
    is_shared: bool
    """Whether a shared checkpoint has that step; there is none of one from the nodes' disks."""
    data: DataState
    """How far the data were read."""
    origin: Mapping[str, str]
    """What the run's first weights were."""
    losses: Sequence[float] = ()
    """Of the last sound steps, if those to come compare with them."""


def resume(run: Run, report: Report, local: NoLocalCheckpoints) -> Start:
    """Load the newest sound checkpoint, if there is one; called by every rank.

    Raises `ConfigError` if there is one that the configuration does not allow to resume from, and
    `CheckpointError` if it is damaged, was trained with another configuration or other data, or if all
    checkpoints are unsound.
    """
    # 1. Nodes may see a shared folder differently for a moment: one rank looks on behalf of all.
    accept_unsound = run.config.checkpoint.accept_unsound
    shared = on_first_rank(lambda: folders.start_from(run.checkpoints, accept_unsound=accept_unsound))
    # 2. The nodes' own are newer, or not of use. One that was set aside is asked for by hand.
    own = local.find(shared) if not accept_unsound else None
    if own:
        check_may_resume(run, own)
        facts = on_first_rank(run.data.facts)
        on_first_rank(lambda: check_same_run(own, run.config, facts))
        why = local.load(own)
        if not why:
            return _go_on(run, report, own, facts, is_shared=False)
        report.notice(f"{own} does not load: {why}")
        if not shared:
            raise CheckpointError(
                f"{own} does not load, and there is no shared checkpoint to go on from instead: start "
                "from scratch with checkpoint.local_dir=null, or in another run.dir"
            )
    # 3. The shared one, or weights to begin with.
    if shared:
        return _resume_from(run, report, shared)
    origin = start_from_files(run, report)
    return Start(step=0, is_shared=True, data=data_of_a_new_run(run), origin=origin)


def check_may_resume(run: Run, newest: Place) -> None:
    """Raise `ConfigError` if the configuration does not allow to resume from a checkpoint."""
    step, num_steps = folders.step_of(newest), run.config.train.steps
    if not run.config.checkpoint.resume:
        raise ConfigError(
            f"checkpoint.resume=false, but an earlier run left {newest}: choose another run.dir, or go "
            "on with checkpoint.resume=true"
        )
    if step > num_steps:
        raise ConfigError(
            f"train.steps={num_steps}, but the run has {newest}: raise train.steps, or choose another "
            "run.dir to start from the beginning"
        )


def data_of_a_new_run(run: Run) -> DataState:
    """Nothing was read yet."""
    return DataState({}, [mixture_of(run.config, 1)])


def _resume_from(run: Run, report: Report, newest: Place) -> Start:
    check_may_resume(run, newest)
    facts, step = on_first_rank(run.data.facts), folders.step_of(newest)
    if step == run.config.train.steps:
        # Nothing is left to train, so nothing has to be loaded.
        on_first_rank(lambda: check_same_run(newest, run.config, facts))
        return Start(step=step, is_shared=True, data=data_of_a_new_run(run), origin={})
    load(newest, run.config, run.modules, run.optimizer, facts=facts)
    return _go_on(run, report, newest, facts, is_shared=True)


def _go_on(run: Run, report: Report, newest: Place, facts: Mapping[str, str], *, is_shared: bool) -> Start:
    """What a checkpoint has apart from what was loaded already."""
    step = folders.step_of(newest)
    origin = on_first_rank(lambda: origin_of(newest))
    if run.config.checkpoint.has_initial_weights:
        report.notice(f"checkpoint.init_from is not read again: the run goes on from {newest}")
    for note in on_first_rank(lambda: notes_on(newest, facts)):
        report.notice(note)
    data, is_mixed_alike = go_on_with_data(run, report, newest, step)
    # Losses of another mixture are no measure for those to come.
    losses = on_first_rank(lambda: losses_before(newest, facts)) if is_mixed_alike else []
    return Start(step=step, is_shared=is_shared, data=data, origin=origin, losses=losses)

"""What a run starts with, apart from the state of its newest checkpoint: first weights, or where data are."""

from collections.abc import Mapping

from k25_train.checkpoint import folders
from k25_train.checkpoint.agreement import on_first_rank
from k25_train.checkpoint.data_state import DataState, changes, mixture_of, read_data_state
from k25_train.checkpoint.initial import start_from_weights
from k25_train.checkpoint.storage.kinds import Place
from k25_train.metrics.report import Report
from k25_train.training.run import Run


def start_from_files(run: Run, report: Report) -> Mapping[str, str]:
    """Take the weights that a new run starts from, if there are any; returns facts of what they are."""
    if not run.config.checkpoint.has_initial_weights:
        return {}
    started = start_from_weights(run.config, run.modules, run.optimizer)
    for note in started.notes:
        report.notice(note)
    return started.facts


def go_on_with_data(run: Run, report: Report, checkpoint: Place, step: int) -> tuple[DataState, bool]:
    """Have the data go on behind a step; how far they were read, and whether they are mixed as before, so
    that losses compare."""
    saved = on_first_rank(lambda: read_data_state(checkpoint))
    now = mixture_of(run.config, step + 1)
    if not saved.loader:
        report.notice(
            f"{checkpoint} has no {folders.DATA_STATE}: its {step} steps are planned again, from 1 on"
        )
    run.data.start_from(step, saved.loader)
    changed = changes(saved.mixtures[-1], now)
    if changed:
        report.notice(f"from step {step + 1} on the data are mixed in another way:")
    for line in changed:
        report.notice(f"  {line}")
    return saved.with_mixture(now), not changed

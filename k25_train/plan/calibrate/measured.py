"""What a run folder says of its steps: how long the steady ones took, by how much of them was images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from k25_train.config.schema import Config
from k25_train.errors import ConfigError, K25Error
from k25_train.plan.calibrate.traced import TracedPass, traced_passes
from k25_train.run_folder.rows_file import METRICS_FILE, Row, number, read_rows

CONFIG_FILE = "config.yaml"
NUM_FIRST_STEPS = 3
"""Steps that are left out at the start: kernels are built and caches filled. Our choice."""
FEWEST_STEPS = 4
"""Steady steps that a run needs. Our choice."""
ALIKE = 0.04
"""Range of the steps' shares of images within which all count as alike. Our choice."""
MOST_GROUPS = 3
"""Groups of steps by their share of images. Our choice."""


class CalibrationError(K25Error):
    """Runs from which no constants can be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGroup:
    """Steps of a run with about the same share of images."""

    vision_share: float
    """Share of all tokens that are images', the mean of these steps."""
    num_steps: int
    """How many there are."""
    step_s: float
    """Their median duration, without what they waited for data."""
    noise: float
    """Standard error of that, as a share of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A run, as far as plans can be compared with it."""

    name: str
    """Its folder."""
    config: Config
    """Its configuration."""
    groups: tuple[StepGroup, ...]
    """Its steady steps."""
    passes: tuple[TracedPass, ...] = ()
    """Passes of its traced step; none without a trace of the CPU's."""
    trace_vision_share: float = 0.0
    """Share of images in that step."""


def read_run(folder: Path, load: Callable[[Path], Config], *, reads_trace: bool = True) -> MeasuredRun:
    """What a run folder says.

    Args:
        folder: of the run.
        load: reads a `config.yaml`.
        reads_trace: whether durations of passes are read from a trace.

    Raises:
        CalibrationError: a file is missing or damaged, or there are too few steady steps.
        TraceError: the trace is not one of this run.
    """
    for name in (CONFIG_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise CalibrationError(
                f"{folder}: has no {name}, so no run has trained here: give the run.dir of one that has"
            )
    try:
        config = load(folder / CONFIG_FILE)
    except ConfigError as error:
        raise CalibrationError(f"{folder / CONFIG_FILE}: is not what a run wrote: {error}") from error
    try:
        rows = read_rows(folder / METRICS_FILE)
    except OSError as error:
        raise CalibrationError(f"{folder / METRICS_FILE}: cannot be read ({error.strerror})") from error
    # A plan is of a whole batch, and a ramp begins with smaller ones.
    size_of, whole = config.train.batches.size_of, config.train.global_batch_size
    rows = [row for row in rows if size_of(max(1, int(number(row["step"])))) == whole]
    groups = step_groups(rows, config.train.trace_step, str(folder))
    traced = [row for row in rows if row["step"] == config.train.trace_step and is_timed(row)]
    passes: tuple[TracedPass, ...] = ()
    if reads_trace and traced:
        passes = traced_passes(folder, config)
    return MeasuredRun(
        name=str(folder),
        config=config,
        groups=groups,
        passes=passes,
        trace_vision_share=vision_share(traced[-1]) if traced else 0.0,
    )


def is_timed(row: Row) -> bool:
    """Whether a row is of a step that took time, with how much of it was images."""
    needed = ("step_time_s", "data_wait_s", "tokens", "vision_tokens")
    if any(isinstance(row.get(key), list | None) for key in needed):
        return False
    return number(row["step_time_s"]) > number(row["data_wait_s"]) and number(row["tokens"]) > 0


def vision_share(row: Row) -> float:
    """Share of a step's tokens that are images'."""
    return number(row["vision_tokens"]) / number(row["tokens"])


def step_groups(rows: Sequence[Row], trace_step: int | None, name: str) -> tuple[StepGroup, ...]:
    """The steady steps, in groups of about the same share of images; the traced one is slower, and left out.

    Raises `CalibrationError` if there are too few, naming the run.
    """
    steps = [row for row in rows if "step_time_s" in row]
    first = min((number(row["step"]) for row in steps), default=0)
    steady = [
        row
        for row in steps
        if number(row["step"]) >= first + NUM_FIRST_STEPS and row["step"] != trace_step and is_timed(row)
    ]
    if len(steady) < FEWEST_STEPS:
        raise CalibrationError(
            f"{name}: {METRICS_FILE} has {len(steady)} steady steps, {FEWEST_STEPS} are needed; the first "
            f"{NUM_FIRST_STEPS} and a traced one do not count: train 20 or so, with the same layout"
        )
    # 1. As many groups as there are kinds of steps, and steps for.
    steady.sort(key=vision_share)
    spread = vision_share(steady[-1]) - vision_share(steady[0])
    num_groups = 1 if spread <= ALIKE else min(MOST_GROUPS, len(steady) // FEWEST_STEPS)
    # 2. Equally many steps for each.
    bounds = [len(steady) * index // num_groups for index in range(num_groups + 1)]
    return tuple(_group(steady[start:end]) for start, end in pairwise(bounds))


def _group(rows: Sequence[Row]) -> StepGroup:
    seconds = [number(row["step_time_s"]) - number(row["data_wait_s"]) for row in rows]
    middle_s = median(seconds)
    # A normal distribution's standard deviation from its median deviation, and a median's error from that.
    deviation_s = 1.4826 * median(abs(each - middle_s) for each in seconds)
    return StepGroup(
        vision_share=fmean(map(vision_share, rows)),
        num_steps=len(rows),
        step_s=middle_s,
        noise=1.2533 * deviation_s / middle_s / len(rows) ** 0.5,
    )

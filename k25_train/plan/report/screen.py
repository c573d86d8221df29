"""A plan on one screen: the verdict first, then speed, where time and memory go, layout and assumptions."""

import math
import textwrap
from collections.abc import Iterator

from rich.text import Text

from k25_train.plan.memory.verdict import Fit, MemoryVerdict
from k25_train.plan.report.bars import amount, bar_rows, largest, side_by_side
from k25_train.plan.report.labels import LABEL_WIDTH, memory_amounts, time_amounts
from k25_train.plan.report.planned import Planned
from k25_train.plan.report.text import format_gb
from k25_train.plan.report.words import (
    assumed_text,
    layout_text,
    overlapped_text,
    shared_text,
    sizes_text,
    title_text,
)
from k25_train.units import format_count, format_duration

NUM_LINES = 23
"""Of a screen of 24 the prompt takes one."""
LEAST_WIDTH, MOST_WIDTH = 80, 100
FEWEST_ROWS, MOST_ROWS = 5, 12
COLORS = {Fit.fits: "bold green", Fit.tight: "bold yellow", Fit.does_not_fit: "bold red"}
UNMEASURED = "Computed, nothing measured."
MORE = f"{UNMEASURED} --details --html FILE --search --what-if KIND"


def screen(planned: Planned, width: int) -> list[Text]:
    """All lines; none is longer than `width`, which counts as within 80 to 100, but overrides to paste."""
    width = min(max(width, LEAST_WIDTH), MOST_WIDTH)
    # 1. What is above and below the bars; these have as many rows as that leaves.
    top = [*verdict_lines(planned, width), Text(), *map(Text, speed_lines(planned)), Text()]
    bottom = [Text(), *_wrapped(_bottom(planned), width)]
    room = NUM_LINES - 1 - sum(_num_rows(line, width) for line in top) - 1 - len(bottom)
    num_rows = min(max(room, FEWEST_ROWS), MOST_ROWS)
    # 2. Time to the left, memory to the right.
    column = width // 2
    times = bar_rows(largest(time_amounts(planned.step), num_rows), column - 2, LABEL_WIDTH)
    held = bar_rows(largest(memory_amounts(planned.fullest), num_rows), width - column, LABEL_WIDTH)
    heading = f"{'Seconds of a step':<{column}}GB on a device of stage {planned.verdict.stage}"
    rows = [Text(line) for line in side_by_side(times, held, column)]
    return [Text(title_text(planned.pipeline), "bold"), *top, Text(heading, "bold"), *rows, *bottom]


def verdict_lines(planned: Planned, width: int) -> list[Text]:
    """Whether it fits, with which margin, and what would help."""
    verdict = planned.verdict
    word = verdict.fit.value.upper()
    first, *rest = verdict_text(planned)
    lines = _wrapped([f"{word}  {first}", *rest], width)
    lines[0].stylize(COLORS[verdict.fit], 0, len(word))
    return [*lines, *map(Text, remedy_lines(verdict))]


def verdict_text(planned: Planned) -> list[str]:
    """Margins of devices and hosts, a sentence each."""
    return [*_device(planned.verdict), *_host(planned.verdict)]


def _device(verdict: MemoryVerdict) -> Iterator[str]:
    margin = verdict.margin_bytes
    if margin is None or verdict.limit_bytes is None:
        yield f"{format_gb(verdict.device_bytes)} GB per rank, which are the host's: the device is the CPU"
        return
    what = f"{format_gb(-margin)} GB too little" if margin < 0 else f"{format_gb(margin)} GB left"
    held = f"{format_gb(verdict.device_bytes)} of {format_gb(verdict.limit_bytes)}"
    yield f"{what} on devices of stage {verdict.stage}, the fullest: {held}"


def _host(verdict: MemoryVerdict) -> Iterator[str]:
    held, limit = format_gb(verdict.node_bytes), format_gb(verdict.node_limit_bytes)
    if verdict.limit_bytes is None:
        yield f"host memory: {held} GB on the fullest node, which has {limit}; not judged on CPUs"
        return
    left = verdict.node_limit_bytes - verdict.node_bytes
    words = f"{format_gb(-left)} GB too little" if left < 0 else f"{format_gb(left)} GB left"
    yield f"host memory: {words} on the fullest node, {held} of {limit}"


def remedy_lines(verdict: MemoryVerdict) -> Iterator[str]:
    """The cheapest change that makes it fit; the overrides are one line, as they are pasted."""
    remedy = verdict.remedy
    if remedy is not None and remedy.overrides:
        left = f"{format_gb(abs(remedy.left_bytes))} GB"
        if not remedy.fits:
            yield f"no change of memory alone fits; what helps most leaves it {left} short:"
        else:
            word = "cheapest" if remedy.fit is Fit.fits else "best, though tight,"
            yield f"{word} change that fits: {left} left, {remedy.times_cost - 1:+.1%} GPU-time:"
        yield f"  {' '.join(remedy.overrides)}"
    elif verdict.fit is Fit.does_not_fit:
        yield "no change of memory alone was found that helps: more nodes, or --search"


def speed_lines(planned: Planned) -> Iterator[str]:
    """Speed of a GPU, the step, the whole run."""
    step, config = planned.step, planned.pipeline.config
    yield (
        f"{amount(step.tokens_per_s_per_gpu)} tokens/s per GPU   {amount(step.tflops)} TFLOP/s   "
        f"MFU {step.mfu:.1%}"
    )
    yield (
        f"{amount(step.step_s)} s per step of {format_count(step.tokens)} tokens   "
        f"bubble {step.bubble_share:.1%}   exposed communication {exposed_share(planned):.1%}"
    )
    # Smaller steps, those of a ramp, take about as much less.
    whole_batches = config.train.batches.sequences_after(config.train.steps) / config.train.global_batch_size
    yield (
        f"15T tokens: {amount(step.days())} days, {_millions(step.gpu_hours())} GPU-hours   "
        f"the run's {config.train.steps:,} steps: {format_duration(step.step_s * whole_batches)}"
    )


def exposed_share(planned: Planned) -> float:
    """Share of a step in which communication alone takes place."""
    return sum(planned.step.exposed_s.values()) / planned.step.step_s


def _bottom(planned: Planned) -> Iterator[str]:
    pipeline = planned.pipeline
    yield sizes_text(pipeline)
    yield from shared_text(pipeline)
    yield f"layout {layout_text(pipeline.layout)}{overlapped_text(pipeline)}"
    yield assumed_text(pipeline)
    yield MORE


def _wrapped(texts: Iterator[str] | list[str], width: int) -> list[Text]:
    """Lines of at most `width` characters; words that can be pasted stay whole."""
    return [
        Text(line)
        for text in texts
        for line in textwrap.wrap(
            text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    ]


def _num_rows(line: Text, width: int) -> int:
    """Rows of a terminal that a line takes."""
    return max(1, math.ceil(len(line.plain) / width))


def _millions(number: float) -> str:
    return f"{number / 1e6:,.2f}M" if number >= 1e5 else f"{number:,.0f}"

"""What the command prints: the one screen, or tables at the width that they need."""

import json
from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

from k25_train.parameters.released import count_parameters
from k25_train.plan.memory.kernels import kernel_line
from k25_train.plan.memory.stage import fullest, stage_memories
from k25_train.plan.memory.verdict import MemoryVerdict, judge_memory
from k25_train.plan.optimizer import parameter_kinds
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.report.communication import communication_table, dispatcher_table
from k25_train.plan.report.host import host_table
from k25_train.plan.report.memory import (
    item_table,
    memory_as_dict,
    packed_by_part,
    part_table,
    stage_table,
)
from k25_train.plan.report.memory_lines import memory_lines
from k25_train.plan.report.optimizer import rule_lines, state_lines, time_lines
from k25_train.plan.report.parameters import parameter_summary, parameter_table
from k25_train.plan.report.planned import Planned
from k25_train.plan.report.screen import screen
from k25_train.plan.report.step_time import busy_table, time_table
from k25_train.terminal import table_width

ANY_WIDTH = Console(width=1000)
WIDTH_OF_WORDS = 100
"""Columns in which tables with words can be read."""


def print_screen(planned: Planned) -> None:
    """The one screen."""
    console = Console(width=table_width())
    for line in screen(planned, console.width):
        console.print(line, soft_wrap=True, highlight=False)


def print_details(planned: Planned) -> None:
    """The screen, then every table."""
    print_screen(planned)
    config, pipeline = planned.pipeline.config, planned.pipeline
    counts = count_parameters(config.model)
    print_words(time_table(planned.step))
    print_tables([busy_table(planned.step), host_table(planned)])
    tables = [parameter_table(config.model.name, counts), communication_table(config)]
    if config.parallelism.ep > config.cluster.gpus_per_node:
        tables.append(dispatcher_table(config))
    print_tables(tables)
    sizes = config.parallelism
    print_lines(
        [
            parameter_summary(counts),
            f"\nlayout over pp {sizes.pp} x vpp {sizes.vpp}: {pipeline.layout.to_megatron()}\n",
        ]
    )
    print_activations(pipeline, planned.verdict)
    print_lines(["", *optimizer_lines(pipeline)])


def print_activations(pipeline: PipelinePlan, verdict: MemoryVerdict | None = None) -> None:
    """The saved tensors of each part of the model, and the memory of each stage."""
    config, verdict = pipeline.config, verdict or judge_memory(pipeline)
    memories = verdict.memories
    tables = [part_table(config, part, tensors) for part, tensors in packed_by_part(config).items()]
    print_tables([*tables, stage_table(config, memories), item_table(config, fullest(memories))])
    print_lines([kernel_line(config), *memory_lines(pipeline, verdict)])


def optimizer_lines(pipeline: PipelinePlan) -> Iterator[str]:
    """The rule of every parameter and the bytes of its state."""
    yield from rule_lines(parameter_kinds(pipeline.config))
    yield ""
    yield from state_lines(pipeline)
    yield ""
    yield from time_lines(pipeline)


def print_tables(tables: Sequence[Table]) -> None:
    """Tables as wide as the widest; at the width of a narrow terminal rich would cut numbers short."""
    widths = (Measurement.get(ANY_WIDTH, ANY_WIDTH.options, each).maximum for each in tables)
    console = Console(width=max(widths))
    for table in tables:
        console.print(table)


def print_words(table: Table) -> None:
    """A table whose columns of words wrap where the terminal is narrow."""
    console = Console(width=table_width())
    Console(width=max(console.width, WIDTH_OF_WORDS)).print(table)


def print_lines(lines: Sequence[RenderableType]) -> None:
    """Lines of any length, as they are."""
    console = Console()
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_json(what: object) -> None:
    """Data as JSON; what is no number would be no JSON."""
    print(json.dumps(what, indent=2, allow_nan=False))


def activations_as_dict(pipeline: PipelinePlan) -> dict[str, object]:
    """`--activations --json`."""
    return memory_as_dict(pipeline.config, stage_memories(pipeline))

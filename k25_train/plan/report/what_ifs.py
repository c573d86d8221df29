"""What would be if something were otherwise, as a table and as data."""

from rich import box
from rich.table import Table

from k25_train.plan.what_if import Row, WhatIf
from k25_train.units import GB


def what_if_table(found: WhatIf) -> Table:
    """One row per value of what is otherwise."""
    table = Table(
        title=found.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    words = (found.columns[0], "verdict", "next to computation")
    for name in found.columns:
        if name in words:
            table.add_column(name, overflow="fold", no_wrap=name == words[0])
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(*row.cells, style=None if row.is_possible else "dim")
    return table


def what_if_as_dict(found: WhatIf) -> dict[str, object]:
    """The same for JSON."""
    return {"what_if": found.kind.value, "rows": [_row(row) for row in found.rows]}


def _row(row: Row) -> dict[str, object]:
    step, memory = row.step, row.memory
    return {
        "name": row.name,
        "value": row.variant.value,
        "series": row.variant.series,
        "fits": row.is_possible,
        "verdict": row.verdict,
        "peak_gb": row.peak_gb,
        "margin_gb": None if memory is None or memory.margin_bytes is None else memory.margin_bytes / GB,
        "tokens_per_s_per_gpu": None if step is None else step.tokens_per_s_per_gpu,
        "mfu": None if step is None else step.mfu,
        "step_s": None if step is None else step.step_s,
        "parts_s": None if step is None else {part.cause.name: part.seconds for part in step.parts},
    }

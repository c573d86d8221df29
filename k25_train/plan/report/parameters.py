"""The model's parameters as a table and in words."""

from rich.table import Table

from k25_train.parameters.released import ParameterCount
from k25_train.units import format_count


def parameter_table(name: str, counts: ParameterCount) -> Table:
    """One row per module: tensors, parameters, and how many of these a text token uses."""
    table = Table(title=f"Parameters of {name}", title_justify="left", show_footer=True)
    num_tensors = sum(module.num_tensors for module in counts.modules)
    table.add_column("module", footer="total", no_wrap=True)
    table.add_column("tensors", footer=f"{num_tensors:,}", justify="right", no_wrap=True)
    table.add_column("parameters", footer=f"{counts.total:,}", justify="right", no_wrap=True)
    table.add_column("active", footer=f"{counts.active:,}", justify="right", no_wrap=True)
    for module in counts.modules:
        numbers = (module.num_tensors, module.total, module.active)
        table.add_row(module.module, *(f"{number:,}" for number in numbers))
    return table


def parameter_summary(counts: ParameterCount) -> str:
    """The totals in words."""
    return (
        f"language model {format_count(counts.total - counts.vision)}, vision {format_count(counts.vision)}\n"
        f"a text token uses {format_count(counts.active)}, "
        f"{format_count(counts.active_without_embedding)} without the input embedding"
    )

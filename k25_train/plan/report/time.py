"""The budget of a step as a table and as JSON; torch-free."""

from dataclasses import asdict

from rich import box
from rich.table import Table

from k25_train.plan.time.budget import StepBudget
from k25_train.plan.time.step import flops_per_s


def budget_table(budget: StepBudget) -> Table:
    """One row per cause: seconds of a step, and their share of the model's FLOPs."""
    config = budget.pipeline.config
    title = f"{config.model.name} on {config.world_size:,} ranks: seconds of a step"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=True)
    total = (f"{budget.model_s + budget.rest_s:,.2f}", f"+{budget.share:.1%}")
    table.add_column("", footer="sum", no_wrap=True)
    for name, footer in zip(("seconds", "of the model's"), total, strict=True):
        table.add_column(name, footer=footer, justify="right", no_wrap=True)
    table.add_column("computed from", footer="* in the rate, not added", overflow="fold")
    rate = f"model FLOPs at {flops_per_s(config) / 1e12:g} TFLOP/s"
    table.add_row("model FLOPs", f"{budget.model_s:,.2f}", "", rate)
    for row in budget.rows:
        share = f"{row.seconds / budget.model_s:.1%}{'*' if row.in_rate else ' '}"
        table.add_row(row.what, f"{row.seconds:,.2f}", share, row.how)
    return table


def budget_as_dict(budget: StepBudget) -> dict[str, object]:
    """The same for JSON."""
    return {
        "ranks": budget.pipeline.config.world_size,
        "stage": budget.stage.stage,
        "model_s": budget.model_s,
        "rest_s": budget.rest_s,
        "rows": [asdict(row) for row in budget.rows],
    }

"""Where the time of a step goes, and how busy a rank is, as tables."""

from rich import box
from rich.table import Table

from k25_train.plan.time.step_plan import StepPlan


def time_table(step: StepPlan) -> Table:
    """One row per cause, with what it is computed from; rows add up to the step."""
    title = f"Seconds of a step: {step.tokens_per_s_per_gpu:,.0f} tokens/s per GPU"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1, 0, 0)
    )
    table.add_column("cause", footer="step", no_wrap=True)
    table.add_column("seconds", footer=f"{step.step_s:,.2f}", justify="right", no_wrap=True)
    table.add_column("share", footer="100.0%", justify="right", no_wrap=True)
    table.add_column("computed from", overflow="fold")
    for part in sorted(step.parts, key=lambda part: -part.seconds):
        share = f"{part.seconds / step.step_s:.1%}"
        table.add_row(part.cause.value, f"{part.seconds:,.3f}", share, part.how)
    return table


def busy_table(step: StepPlan) -> Table:
    """One row per resource of a rank of the busiest stage: how long it is in use, whatever else is."""
    table = Table(
        title="In use during a step",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("resource", no_wrap=True)
    for name in ("seconds", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, seconds in sorted(step.busy_s.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds:,.3f}", f"{seconds / step.step_s:.1%}")
    return table

"""The status of runs for people: tables that align at 80 columns."""

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from k25_train.units import format_duration
from launch.status.judging import GOING_ON, TROUBLED, State
from launch.status.report import PLAN, AttemptStatus, Pace, RunStatus

MAX_ATTEMPTS, MAX_NODES, MAX_TROUBLES = 10, 3, 5


def print_run(console: Console, status: RunStatus) -> None:
    """Everything about one run."""
    console.print(
        Text.assemble((status.run, "bold"), ": ", (status.state.value, style(status.state))), soft_wrap=True
    )
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(status):
        table.add_row(Text(name), Text(value))
    console.print(table)
    if status.attempts:
        console.print(attempts_table(status))
    if status.blamed_log is not None:
        console.print(Text(f"end of {status.blamed_log.file}:"), soft_wrap=True)
        for line in status.blamed_log.lines:
            console.print(Text(f"  {line}"), soft_wrap=True)


def print_runs(console: Console, statuses: Sequence[RunStatus]) -> None:
    """A line for each of several runs."""
    table = Table()
    for name in ("run", "state", "step", "loss", "end in"):
        is_number = name in ("step", "loss", "end in")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    for status in statuses:
        name, loss = status.run.rstrip("/").rpartition("/")[2], status.loss
        table.add_row(
            Text(name),
            Text(status.state.value, style(status.state)),
            Text(step_text(status)),
            Text("" if loss is None else f"{loss:.4f}"),
            Text("" if status.ends_at_s is None else format_duration(status.ends_at_s - status.at_s)),
        )
    console.print(table)


def style(state: State) -> str:
    """Colour of a state."""
    if state in TROUBLED:
        return "bold red"
    return "green" if state in (*GOING_ON, State.finished) else "yellow"


def rows(status: RunStatus) -> Iterator[tuple[str, str]]:
    """Name and value of each line of the first table."""
    if status.why:
        yield "why", status.why
    if status.model:
        yield "model", status.model
    if status.job is not None:
        job = status.job
        where = f" on {job.nodelist}" if job.nodelist else f", {job.num_nodes} nodes"
        yield "job", f"{job.id} {job.state}{where}" + (f" ({job.comment})" if job.comment else "")
    if status.step is not None:
        yield "step", f"{step_text(status)}, {ago(status.at_s, status.last_step_at_s)}"
    found = (("loss", status.loss, ".4f"), ("grad norm", status.grad_norm, ".3f"))
    values = [f"{name} {value:{form}}" for name, value, form in found if value is not None]
    if values:
        yield "metrics", ", ".join(values)
    if status.pace is not None:
        yield "pace", pace_text(status.pace)
    yield "checkpoint", checkpoint_text(status)
    if status.ends_at_s is not None:
        yield "end", f"{ahead(status.at_s, status.ends_at_s)}, {clock(status.ends_at_s)}"
    for alarm in status.alarms:
        yield "alarm", f"step {alarm.step:,}: {alarm.text}"
    for node, why in status.left_out.items():
        yield "left out", f"{node}: {why}"
    for trouble in status.troubles[:MAX_TROUBLES]:
        yield "unreadable", trouble
    if len(status.troubles) > MAX_TROUBLES:
        yield "unreadable", f"and {len(status.troubles) - MAX_TROUBLES} more files"


def step_text(status: RunStatus) -> str:
    """How far the run is."""
    if status.step is None:
        return ""
    return f"{status.step:,}" + (f" of {status.steps:,}" if status.steps is not None else "")


def pace_text(pace: Pace) -> str:
    """How fast the run is, and how fast it should be."""
    tokens = "" if pace.tokens_per_s is None else f", {pace.tokens_per_s:,.0f} tokens/s"
    expected = "the plan's pace" if pace.expected_by == PLAN else "its own median pace"
    share = f"{pace.expected_step_s / pace.step_s:.0%} of {expected} ({pace.expected_step_s:.3g} s)"
    return f"{pace.step_s:.3g} s per step{tokens}; {share}"


def checkpoint_text(status: RunStatus) -> str:
    """The newest checkpoint and the next."""
    found = status.checkpoints
    newest = "none yet"
    if found.newest_step is not None:
        newest = f"step {found.newest_step:,}, {ago(status.at_s, found.newest_at_s)}"
    if found.next_step is None:
        return newest
    when = "" if found.next_at_s is None else f" {ahead(status.at_s, found.next_at_s)}"
    return f"{newest}; next at step {found.next_step:,}{when}"


def attempts_table(status: RunStatus) -> Table:
    """The latest attempts."""
    attempts = status.attempts
    table = Table()
    table.add_column("attempt", justify="right", no_wrap=True)
    table.add_column("nodes", overflow="fold")
    table.add_column("outcome", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold", ratio=1)
    earlier = len(attempts) - MAX_ATTEMPTS
    if earlier > 0:
        table.add_row("…", "", "", "", f"{earlier} earlier ones")
    for attempt in attempts[-MAX_ATTEMPTS:]:
        table.add_row(
            Text(str(attempt.number)),
            Text(nodes_text(attempt.nodes)),
            Text(outcome_text(status, attempt)),
            Text("" if attempt.reached is None else f"{attempt.reached:,}"),
            Text(attempt.reason),
        )
    return table


def outcome_text(status: RunStatus, attempt: AttemptStatus) -> str:
    """How an attempt ended, if it did."""
    is_running = status.state in GOING_ON and attempt is status.attempts[-1]
    return attempt.outcome or ("running" if is_running else "no outcome")


def nodes_text(nodes: Sequence[str]) -> str:
    """Some nodes, and how many there are."""
    if len(nodes) <= MAX_NODES:
        return " ".join(nodes)
    return f"{len(nodes)}: {nodes[0]} … {nodes[-1]}"


def ago(now_s: float, then_s: float | None) -> str:
    """How long ago something was; clocks of machines may differ."""
    return "" if then_s is None else f"{format_duration(max(0.0, now_s - then_s))} ago"


def ahead(now_s: float, then_s: float) -> str:
    """How far ahead something is."""
    return f"in {format_duration(max(0.0, then_s - now_s))}"


def clock(at_s: float) -> str:
    """A time on this machine's clock."""
    return time.strftime("%a %Y-%m-%d %H:%M", time.localtime(at_s))

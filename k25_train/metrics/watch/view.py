"""The view of a run on a terminal: two columns that fit any width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from k25_train.metrics.watch.seen import Seen
from k25_train.metrics.watch.sparkline import sparkline
from k25_train.units import GB, format_duration

MOST_CURVE, LEAST_CURVE = 48, 8
"""Characters of a curve."""
MISTRUSTED = 0.15
"""Share by which a pace differs from the plan that is marked."""
WAIT_SHOWN = 0.05
"""Share of a step's time spent waiting for data that is marked."""

Line = tuple[str, Text]


def view_of(found: Seen, width: int, encoding: str = "utf-8", trouble: str = "") -> Group:
    """Everything about a run.

    Args:
        found: what is known of it.
        width: characters of a line.
        encoding: of the terminal.
        trouble: why there is nothing newer; empty for nothing.
    """
    title = Text.assemble((found.run, "bold"), f"  {found.model}" if found.model else "")
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=width >= 60, overflow="fold")
    table.add_column(overflow="fold")
    curve = max(LEAST_CURVE, min(MOST_CURVE, width - 40))
    for name, value in lines(found, curve, encoding):
        table.add_row(name, value)
    parts: list[Text | Table] = [title, table]
    parts += [Text(f"alarm: step {alarm.step}: {alarm.short}", "bold red") for alarm in found.alarms]
    if found.num_damaged:
        parts.append(Text(f"{found.num_damaged} line(s) of the file are no rows", "yellow"))
    if trouble:
        parts.append(Text(trouble, "yellow"))
    return Group(*parts)


def lines(found: Seen, curve: int, encoding: str) -> Iterator[Line]:
    """Name and value of each line, of what rows tell of."""
    yield "step", Text(progress_text(found))
    if found.losses:
        yield "loss", with_curve(f"{found.losses[-1]:.4f}", found.losses, curve, encoding)
    for name, losses in found.held_out.items():
        if losses:
            source = name.removeprefix("loss/")
            title = f"held-out {name.removesuffix('_loss')}" if source == name else f"  of source {source}"
            yield title, with_curve(f"{losses[-1]:.4f}", losses, curve, encoding)
    for title, numbers, form in (
        ("loss by source", found.source_losses, ".4f"),
        ("gradient norm", found.grad_norms, ".4g"),
        ("weight norm", found.weight_norms, ".5g"),
    ):
        if numbers:
            yield title, Text(joined(numbers, form))
    for title, text in (
        ("rollouts", rollouts_text(found)),
        ("engines", engines_text(found)),
        ("learning rate", rate_text(found)),
        ("batch", batch_text(found)),
        ("experts", experts_text(found)),
        ("attention", logits_text(found)),
        ("memory", memory_text(found)),
    ):
        if text:
            yield title, Text(text)
    yield from pace_lines(found)


def with_curve(value: str, values: list[float], curve: int, encoding: str) -> Text:
    """A value behind the curve that leads to it."""
    return Text.assemble((sparkline(values, curve, encoding), "cyan"), " ", (value, "bold"))


def joined(numbers: Mapping[str, float], form: str) -> str:
    """Names with their numbers."""
    return ", ".join(f"{name} {number:{form}}" for name, number in numbers.items())


def progress_text(found: Seen) -> str:
    """How far the run is, and when it ends."""
    if found.step is None:
        return "none yet"
    text = f"{found.step:,}"
    if found.steps:
        text += f" of {found.steps:,}, {found.step / found.steps:.0%}"
    left_s = found.latest.get("time_left_s")
    if left_s is not None and not found.is_done:
        text += f", {format_duration(left_s)} left"
    return text


def rollouts_text(found: Seen) -> str:
    """What the responses of the latest step earned, how long they are, and how far from the policy."""
    forms = {
        "reward": "reward {:.3f}",
        "accuracy": "accuracy {:.3f}",
        "response_tokens": "{:.1f} tokens an answer",
        "failed_share": "{:.1%} failed",
        "length_share": "{:.1%} at the limit",
        "policy/mask_share": "{:.2%} of the tokens masked",
        "staleness": "{:.2g} steps stale",
    }
    latest = found.latest
    return ", ".join(form.format(latest[name]) for name, form in forms.items() if name in latest)


def engines_text(found: Seen) -> str:
    """What engines did in the latest step, and how far they are from the trainer."""
    forms = {
        "engines": "{:.0f} serving",
        "engine_idle": "{:.0%} idle",
        "rollout_s": "{:.2f} s of rollouts",
        "sync_s": "{:.2f} s of a push",
        "policy/gap": "log-probabilities {:.2g} nats apart",
    }
    latest = found.latest
    return ", ".join(form.format(latest[name]) for name, form in forms.items() if name in latest)


def rate_text(found: Seen) -> str:
    """The learning rate of the latest step."""
    return f"{found.latest['lr']:.3g}" if "lr" in found.latest else ""


def batch_text(found: Seen) -> str:
    """Size and content of the global batch."""
    latest = found.latest
    parts = []
    if "batch" in latest and "seq_len" in latest:
        parts.append(f"{latest['batch']:,.0f} x {latest['seq_len']:,.0f} tokens")
    for key, name in (("padding_share", "padding"), ("vision_ratio", "of sources with media")):
        if key in latest:
            parts.append(f"{latest[key]:.1%} {name}")
    return ", ".join(parts)


def experts_text(found: Seen) -> str:
    """How evenly experts are loaded."""
    latest = found.latest
    if "expert_load" not in latest:
        return ""
    text = f"{latest['expert_load']:.3g} max/mean"
    if "dead_experts" in latest:
        text += f", {latest['dead_experts']:.0f} dead"
    if "expert_bias" in latest:
        text += f", bias {latest['expert_bias']:.3g} ({latest.get('expert_bias_change', 0.0):+.1g})"
    return text


def logits_text(found: Seen) -> str:
    """What QK-Clip has seen and done."""
    if "max_logit" not in found.latest:
        return ""
    clipped = found.latest.get("heads_clipped", 0.0)
    return f"largest logit {found.latest['max_logit']:.4g}, {clipped:.0f} heads clipped"


def memory_text(found: Seen) -> str:
    """Device memory of the worst rank, next to its plan."""
    used = found.latest.get("memory_peak_allocated_bytes")
    if used is None:
        return ""
    planned = found.latest.get("memory_planned_bytes")
    return f"{used / GB:.1f} GB" + (f" of {planned / GB:.1f} planned" if planned else "")


def pace_lines(found: Seen) -> Iterator[Line]:
    """How fast the run is, and what it waits for."""
    latest, step_s, planned_s = found.latest, found.step_s, found.planned_step_s
    if found.tokens_per_s is not None:
        text = f"{found.tokens_per_s:,.0f} tokens/s"
        if latest.get("tokens_per_s_per_gpu"):
            num_gpus = latest["tokens_per_s"] / latest["tokens_per_s_per_gpu"]
            text += f", {found.tokens_per_s / num_gpus:,.0f} per GPU"
        if "mfu" in latest:
            text += f", MFU {latest['mfu']:.1%}"
        yield "throughput", Text(text)
    if step_s is not None:
        step = Text(f"{step_s:.3g} s")
        if planned_s:
            off = step_s / planned_s - 1
            step.append(f", {off:+.0%} of {planned_s:.3g} s planned", "yellow" if off > MISTRUSTED else "")
        if (wait_s := latest.get("data_wait_s")) is not None:
            step.append(
                f", {wait_s:.2f} s waiting for data", "yellow" if wait_s > WAIT_SHOWN * step_s else ""
            )
        yield "time of a step", step

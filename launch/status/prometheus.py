"""The status of runs as a text file for node_exporter's textfile collector.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (text, version 0.0.4). Without time
stamps, which the collector refuses.
"""

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launch.status.judging import State
from launch.status.report import RunStatus

Sample = tuple[Mapping[str, str], float]
"""Labels other than the run's, and the value."""

GAUGES = {
    "k25_run_state": "1 for the state that the run is in, 0 for the others.",
    "k25_run_step": "Last optimizer step that was finished.",
    "k25_run_steps": "Optimizer steps of the whole run (train.steps).",
    "k25_run_loss": "Training loss of the last step, in nats per token.",
    "k25_run_grad_norm": "Gradient norm of the last step.",
    "k25_run_learning_rate": "Learning rate of the last step.",
    "k25_run_last_step_timestamp_seconds": "When the last step was finished.",
    "k25_run_step_seconds": "Seconds per step, median of the latest 20.",
    "k25_run_expected_step_seconds": "Seconds per step by the plan, or the median of the run's own steps.",
    "k25_run_tokens_per_second": "Tokens per second, median of the latest 20 steps.",
    "k25_run_checkpoint_step": "Step of the newest complete checkpoint.",
    "k25_run_checkpoint_timestamp_seconds": "When the newest complete checkpoint was written.",
    "k25_run_next_checkpoint_timestamp_seconds": "When the next checkpoint is expected.",
    "k25_run_end_timestamp_seconds": "When the run is expected to end.",
    "k25_run_nodes": "Nodes that run its ranks, or did in its newest attempt.",
    "k25_run_alarm_step": "Step of the latest alarm of each kind, among the latest steps.",
    "k25_run_left_out_node": "1 for each node of its job that runs no ranks.",
    "k25_run_attempts": "Starts of its ranks, by outcome.",
    "k25_run_unreadable_files": "Files of the run folder that could not be read.",
    "k25_run_status_timestamp_seconds": "When the run was looked at.",
}
"""Name -> help."""


def as_text(statuses: Sequence[RunStatus]) -> str:
    """The whole file."""
    found: dict[str, list[Sample]] = {name: [] for name in GAUGES}
    lines: list[str] = []
    for status in statuses:
        for name, labels, value in samples(status):
            found[name].append(({"run": status.run, **labels}, value))
    for name, values in found.items():
        if values:
            lines += [f"# HELP {name} {GAUGES[name]}", f"# TYPE {name} gauge"]
            lines += [f"{name}{{{labels_text(labels)}}} {value!r}" for labels, value in values]
    return "\n".join([*lines, ""])


def samples(status: RunStatus) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """Name, labels and value of everything that is known of a run."""
    for state in State:
        yield "k25_run_state", {"state": state.value}, float(state == status.state)
    pace, saved = status.pace, status.checkpoints
    values = {
        "k25_run_step": status.step,
        "k25_run_steps": status.steps,
        "k25_run_loss": status.loss,
        "k25_run_grad_norm": status.grad_norm,
        "k25_run_learning_rate": status.learning_rate,
        "k25_run_last_step_timestamp_seconds": status.last_step_at_s,
        "k25_run_step_seconds": None if pace is None else pace.step_s,
        "k25_run_tokens_per_second": None if pace is None else pace.tokens_per_s,
        "k25_run_checkpoint_step": saved.newest_step,
        "k25_run_checkpoint_timestamp_seconds": saved.newest_at_s,
        "k25_run_next_checkpoint_timestamp_seconds": saved.next_at_s,
        "k25_run_end_timestamp_seconds": status.ends_at_s,
        "k25_run_nodes": len(status.attempts[-1].nodes) if status.attempts else None,
        "k25_run_unreadable_files": len(status.troubles),
        "k25_run_status_timestamp_seconds": status.at_s,
    }
    for name, value in values.items():
        if value is not None:
            yield name, {}, float(value)
    if pace is not None:
        yield "k25_run_expected_step_seconds", {"by": pace.expected_by}, pace.expected_step_s
    for alarm in {alarm.name: alarm for alarm in reversed(status.alarms)}.values():
        yield "k25_run_alarm_step", {"alarm": alarm.name}, float(alarm.step)
    for node in status.left_out:
        yield "k25_run_left_out_node", {"node": node}, 1.0
    for outcome, count in Counter(each.outcome or "none" for each in status.attempts).items():
        yield "k25_run_attempts", {"outcome": outcome}, float(count)


def labels_text(labels: Mapping[str, str]) -> str:
    """Labels as the format wants them."""
    return ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())


def escaped(value: str) -> str:
    """The value of a label: backslash, quote and line feed are escaped, what is no text is replaced."""
    valid = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return valid.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def write(path: Path, text: str) -> None:
    """Replace the file such that the collector never sees half of it, and may read it. Raises OSError."""
    # It reads what ends in .prom.
    descriptor, scratch = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise

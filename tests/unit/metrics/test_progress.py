"""What a run prints, on a terminal and elsewhere, and its summary."""

from __future__ import annotations

import io

from rich.console import Console

from k25_train.metrics.progress import Progress, status_text
from k25_train.metrics.sinks import Row
from k25_train.metrics.summary import Peak, summary_lines, summary_table


def rows(num_steps: int) -> list[Row]:
    """A run with evaluations before the first step and at the last."""
    found: list[Row] = [{"step": 0, "eval_text_loss": 8.0, "eval_caption_loss": 6.0}]
    found += [
        {
            "step": step,
            "loss": 8.0 - 4.0 * step / num_steps,
            "grad_norm": 1.25,
            "tokens": 4096,
            "vision_tokens": 96,
            "images": 6,
            "step_time_s": 5.0 if step == 1 else 0.5,
            "tokens_per_s": 8192.0,
            "flops": 1e12,
        }
        for step in range(1, num_steps + 1)
    ]
    found[-1] = {**found[-1], "eval_text_loss": 4.0, "eval_caption_loss": None}
    return found


def shown(num_steps: int, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    with Progress(num_steps, console) as progress:
        progress.print("checkpoint [step_5] saved")
        for row in rows(num_steps):
            progress.show(row, time_left_s=75.0)
    return stream.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    text = shown(600, terminal=False)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert "checkpoint [step_5] saved" in lines
    assert "step 0/600  held-out  text 8.0000  caption 6.0000" in lines
    assert "step 1/600  loss 7.9933  grad norm 1.250  8,192 tokens/s  1m15s left" in lines
    assert "step 600/600  loss 4.0000  grad norm 1.250  8,192 tokens/s  1m15s left" in lines
    assert "step 600/600  held-out  text 4.0000  caption nan" in lines
    assert len(lines) == 1 + 2 + 61


def test_waiting_for_data_is_shown_where_it_matters() -> None:
    row: Row = {"loss": 1.0, "step_time_s": 10.0, "data_wait_s": 0.4}
    assert status_text(row, 75.0) == "loss 1.0000  1m15s left"
    assert status_text({**row, "data_wait_s": 6.0}, 75.0) == "loss 1.0000  6.0 s waiting for data  1m15s left"


def test_short_runs_print_every_step() -> None:
    assert len(shown(3, terminal=False).splitlines()) == 1 + 2 + 3


def test_terminal_has_one_live_line() -> None:
    text = shown(600, terminal=True)
    assert "600/600" in text
    assert "loss 4.0000" in text
    assert text.count("grad norm") < 60


def test_summary() -> None:
    lines = dict(summary_lines(rows(100), Peak(10e12, "4 x H800")))
    assert lines["steps"] == "100"
    assert lines["tokens"] == "409,600, of which vision 9,600"
    assert lines["time in steps"] == "54s"
    assert lines["training loss"] == "7.9600 -> 4.1800 (-47.5%)"
    assert lines["held-out text loss"] == "8.0000 -> 4.0000 (-50.0%)"
    assert lines["speed"] == "8,192 tokens/s"
    assert lines["MFU"] == "20.0% of 4 x H800"
    assert "step" not in lines


def test_summary_has_steps_next_to_their_plan() -> None:
    planned = [row | {"planned_step_time_s": 0.4} if "loss" in row else row for row in rows(100)]
    assert dict(summary_lines(planned, None))["step"] == "0.5 s, planned 0.4 s (+25%)"


def test_summary_leaves_out_what_is_not_known() -> None:
    lines = dict(summary_lines(rows(5)[1:-1], None))
    assert "MFU" not in lines
    assert "held-out text loss" not in lines
    assert dict(summary_lines(rows(0)[:1], None)) == {"steps": "0"}


def test_summary_table_prints() -> None:
    stream = io.StringIO()
    Console(file=stream, width=100).print(summary_table(rows(10), title="run finished"))
    assert "run finished" in stream.getvalue()
    assert "8.0000 -> 4.0000 (-50.0%)" in stream.getvalue()

"""The progress of a run: one live line on a terminal, plain lines elsewhere. Only rank 0 shows it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from k25_train.metrics.sinks import Row, number
from k25_train.units import format_duration

PLAIN_LINES = 60
"""About how many plain lines a whole run prints, evaluations apart."""

WAIT_SHOWN = 0.05
"""Share of a step's time spent waiting for data from which on the line says so."""


class Progress:
    """Shows step, loss, gradient norm, tokens/s and time left; a context manager."""

    def __init__(self, total_steps: int, console: Console) -> None:
        self.console = console
        self._total_steps = total_steps
        self._plain_interval = max(1, total_steps // PLAIN_LINES)
        self._live = RichProgress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task("train", total=total_steps, status="")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, row: Row, time_left_s: float) -> None:
        """Show a finished step; held-out losses in the row get a line that stays."""
        step = int(number(row["step"]))
        status = status_text(row, time_left_s)
        if self.console.is_terminal:
            self._live.update(self._task, completed=step, status=status)
        elif "loss" in row and (step % self._plain_interval == 0 or step in (1, self._total_steps)):
            self.print(f"step {step}/{self._total_steps}  {status}")
        evaluation = evaluation_text(row)
        if evaluation:
            self.print(f"step {step}/{self._total_steps}  held-out  {evaluation}")

    def print(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def status_text(row: Row, time_left_s: float) -> str:
    """The live line of one step."""
    formats = {
        "reward": "reward {:.3f}",
        "response_tokens": "{:.1f} tokens an answer",
        "loss": "loss {:.4f}",
        "grad_norm": "grad norm {:.3f}",
        "tokens_per_s": "{:,.0f} tokens/s",
    }
    parts = [formats[key].format(number(row[key])) for key in formats if key in row]
    wait_s, step_s = (number(row.get(key, 0.0)) for key in ("data_wait_s", "step_time_s"))
    if wait_s > WAIT_SHOWN * step_s:
        parts.append(f"{wait_s:.1f} s waiting for data")
    return "  ".join([*parts, f"{format_duration(time_left_s)} left"])


def evaluation_text(row: Row) -> str:
    """What a row says of held-out data and tasks; empty where it has nothing."""
    names = {
        "eval_text_loss": "text {:.4f}",
        "eval_caption_loss": "caption {:.4f}",
        "eval_reward": "reward {:.3f}",
        "eval_accuracy": "accuracy {:.3f}",
        "eval_response_tokens": "{:.1f} tokens an answer",
    }
    return "  ".join(form.format(number(row[key])) for key, form in names.items() if key in row)

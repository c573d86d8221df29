"""A terminal of twenty columns, or none at all: what is printed stays legible, and nothing fails."""

from io import StringIO

import pytest
from rich.console import Console

from k25_train.metrics.progress import Progress
from k25_train.metrics.summary import summary_table

ROWS = [
    {"step": step, "loss": 8.0 - step, "grad_norm": 1.0, "lr": 1e-3, "tokens": 1000, "text_tokens": 900}
    | {
        "vision_tokens": 100,
        "images": 3,
        "patches": 9,
        "step_time_s": 1.0,
        "tokens_per_s": 1000.0,
        "flops": 1.0,
    }
    for step in range(1, 4)
]


@pytest.mark.parametrize("width", [20, 40])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_summary_fits(width: int, is_terminal: bool) -> None:
    stream = StringIO()
    console = Console(file=stream, width=width, force_terminal=is_terminal, color_system=None)
    console.print(summary_table(ROWS, title="run"))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("steps" in line and "3" in line for line in lines)


@pytest.mark.parametrize("term", ["dumb", "", "unknown"])
def test_progress_is_lines_where_the_terminal_can_nothing(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    stream = StringIO()
    progress = Progress(3, Console(file=stream, width=20, force_terminal=False))
    with progress:
        for row in ROWS:
            progress.show(row, 1.0)
    assert "\x1b" not in stream.getvalue()
    assert "step 3/3" in " ".join(stream.getvalue().split())

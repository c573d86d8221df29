"""mix.png has the share and the held-out loss of every source."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from k25_train.metrics.mix_plot import changes_of_weights, plot_mix, shares_over_steps, sources_of
from k25_train.metrics.sinks import Row

ROWS: list[Row] = [
    {"step": 0, "eval_loss/web": 8.0, "eval_loss/pages": 7.0},
    {"step": 1, "source_tokens/web": 60, "source_tokens/pages": 40, "source_weight/web": 3.0},
    *({"step": step, "source_tokens/web": 60, "source_tokens/pages": 40} for step in range(2, 500)),
    # The same weights after a resume, then others, with another source.
    {"step": 500, "source_tokens/web": 60, "source_tokens/pages": 40, "source_weight/web": 3.0},
    {"step": 501, "source_tokens/web": 25, "source_tokens/code": 75, "source_weight/web": 1.0},
    {"step": 502, "source_tokens/code": 100, "eval_loss/web": 4.0, "eval_loss/code": 5.0},
]


def test_shares_are_of_the_tokens_of_their_steps() -> None:
    assert sources_of(ROWS) == ["web", "pages", "code"]
    steps, shares = shares_over_steps(ROWS, sources_of(ROWS))
    assert len(steps) <= 200 and steps[-1] == 502
    assert [of[0] for of in shares] == [0.6, 0.4, 0.0]
    assert all(abs(sum(of) - 1) < 1e-9 for of in zip(*shares, strict=True))
    assert shares_over_steps(ROWS[-2:], ["web", "code"]) == ([501, 502], [[0.25, 0.0], [0.75, 1.0]])
    assert changes_of_weights(ROWS) == [501]


def test_picture_is_written(tmp_path: Path) -> None:
    for rows in (ROWS, ROWS[:1], []):
        plot_mix(rows, tmp_path / "mix.png", "k25_tiny")
        with Image.open(tmp_path / "mix.png") as image:
            assert image.size == (1200, 1050)

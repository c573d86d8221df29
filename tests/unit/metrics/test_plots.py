"""loss.png holds every line that the rows have."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from k25_train.metrics.plots import draw_evaluations, draw_training, label_ends, plot_losses
from k25_train.metrics.sinks import Row

ROWS: list[Row] = [
    {"step": 0, "eval_text_loss": 8.3, "eval_caption_loss": 8.2},
    *({"step": step, "loss": 8.3 - 0.01 * step} for step in range(1, 100)),
    {"step": 100, "loss": None, "eval_text_loss": 7.1, "eval_caption_loss": 6.0},
]


def test_picture_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    path.write_text("an older one")
    plot_losses(ROWS, path, "k25_tiny")
    with Image.open(path) as image:
        assert image.size == (1200, 675)
        assert len(image.convert("RGB").getcolors(2**24) or []) > 20


def test_rows_without_losses_give_an_empty_picture(tmp_path: Path) -> None:
    plot_losses([], tmp_path / "loss.png", "nothing yet")
    assert (tmp_path / "loss.png").exists()


def test_lines_have_the_values() -> None:
    axes = Figure().subplots()
    ends = draw_training(axes, [row for row in ROWS if "loss" in row][:-1])
    each, smooth = axes.get_lines()
    assert list(each.get_xdata()) == list(range(1, 100))
    assert abs(smooth.get_ydata()[-1] - (8.3 - 0.98)) < 1e-9  # the mean of steps 97, 98, 99
    ends += draw_evaluations(axes, [ROWS[0], ROWS[-1]], "eval_text_loss", "held-out text", "blue")
    assert list(axes.get_lines()[2].get_ydata()) == [8.3, 7.1]
    label_ends(axes, [*ends, (100, float("nan"), "red")])
    assert sorted(text.get_text() for text in axes.texts) == ["7.10", "7.32"]


def test_close_ends_are_labelled_apart() -> None:
    axes = Figure().subplots()
    axes.set_ylim(0, 10)
    label_ends(axes, [(1, 5.0, "red"), (1, 5.01, "blue"), (1, 9.0, "green")])
    heights = sorted(text.xy[1] for text in axes.texts)
    assert heights[1] - heights[0] > 0.4
    assert heights[2] == 9.0

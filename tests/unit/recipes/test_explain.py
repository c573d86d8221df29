"""Chains that are explained: every column, and curves that can be told apart."""

from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.parts import ModelPart
from k25_train.errors import ConfigError
from k25_train.plan.stage_schedule import chain_curves
from k25_train.recipes.chain import load_chain
from k25_train.recipes.explain import draw, explain, rate_groups
from k25_train.recipes.stages import main
from tests.helpers.in_process import status_of_command

STAGES = ("smoke_lm", "smoke_vit", "smoke_joint")


def test_no_column_is_left_out_at_140_columns(tmp_path: Path) -> None:
    stages = [(name, compose([f"experiment={name}"])) for name in STAGES]
    text = explain(stages, 140)
    assert "no room" not in text and "from the one before" not in text
    for column in ("end", "steps", "RoPE x", "vision", "learning rate", "trained", "optimizer"):
        assert column in text
    assert all(line == line.rstrip() for line in text.splitlines())
    groups = [list(rate_groups(curve)) for curve in chain_curves(stages)]
    assert groups[0] == [(ModelPart.language_model,)]
    assert groups[2] == [tuple(ModelPart)]
    for shown in (stages, stages[:1]):
        draw(shown, tmp_path / "chain.png")
        assert (tmp_path / "chain.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--explain", "--commands"], "each prints something else"),
        (["--explain", "--png", "absent/a.png"], "absent is no folder"),
        (["--png", "a.png"], "is for --explain"),
    ],
)
def test_options_are_refused_before_a_chain_is_read(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status_of_command(main, "chain=none", *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_text_is_no_chain(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("hello")
    with pytest.raises(ConfigError, match="expected a chain of stages"):
        load_chain(str(path))

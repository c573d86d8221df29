"""The picture and the page of a run, from rows and answers that are made up."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from k25_train.environments.base import Verdict, failed, scored, unscored
from k25_train.environments.family import Split
from k25_train.environments.registry import make_family
from k25_train.errors import DataError
from k25_train.metrics.conversations_page import page
from k25_train.metrics.rl_plot import Arm, budget_phases, plot_arms, plot_run
from k25_train.rl.conversations import Answer, answers_path, evaluations, read_answers, write_answers
from k25_train.rl.report import ROLLOUTS, write_report
from tests.helpers.browser import opened

STEPS = 40


def rows() -> list[dict[str, float]]:
    """Of a run that gets shorter and better."""
    found: list[dict[str, float]] = []
    for step in range(STEPS + 1):
        row: dict[str, float] = {"step": step}
        if step:
            row |= {
                "reward": 0.5 + step / 100,
                "accuracy": 0.6 + step / 100,
                "response_tokens": 30 - step / 2,
                "policy/gap": 1e-6,
                "policy/gap_max": 1e-5,
                "toggle/phase": float((step - 1) // 10 % 2),
                "toggle/budget_tokens": 12.0,
            }
        if step % 20 == 0:
            row |= {
                "eval_reward": 0.5,
                "eval_accuracy": 0.6 + step / 100,
                "eval_response_tokens": 30 - step / 2,
            }
        found.append(row)
    return found


def answer(number: int, text: str, verdict: Verdict, family: str = "sums") -> Answer:
    task = make_family(family, None).task(Split.HELDOUT, number)
    return Answer(task=task, text=text, num_tokens=7, verdict=verdict)


def test_phases_with_a_budget_are_found() -> None:
    assert list(budget_phases(rows())) == [(1, 10), (21, 30)]
    assert list(budget_phases(rows()[:6])) == [(1, 5)]
    assert list(budget_phases([{"step": 1, "reward": 1.0}])) == []


@pytest.mark.parametrize("kept", [rows(), [{"step": 1, "reward": math.nan}]])
def test_any_rows_give_a_picture(kept: list[dict[str, float]], tmp_path: Path) -> None:
    plot_run(kept, tmp_path / "rl.png", "a run")
    pixels = np.asarray(Image.open(tmp_path / "rl.png").convert("RGB"))
    assert pixels.shape == (1050, 1650, 3)


def test_runs_are_drawn_on_top_of_one_another(tmp_path: Path) -> None:
    arms = [Arm(label=label, rows=rows()) for label in ("alone", "with", "alone")]
    plot_arms([*arms, Arm(label="nothing yet", rows=[])], tmp_path / "arms.png")
    assert Image.open(tmp_path / "arms.png").size == (1650, 675)


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    answers = [
        answer(0, "<think>…</think>7<|im_end|>", scored(1.0, {"accuracy": 1.0})),
        answer(1, "x", failed("empty: nothing")),
        answer(2, "y", unscored("judge raised: it did")),
        answer(3, "z", scored(0.5, {}), "counting"),
    ]
    path = answers_path(tmp_path / "new", 20)
    write_answers(path, answers)
    found = read_answers(path)
    assert [each.task for each in found] == [each.task.key for each in answers]
    assert [each.reward for each in found[:2]] == [1.0, 0.0] and math.isnan(found[2].reward)
    assert found[1].reason == "empty: nothing"
    assert found[0].prompt == answers[0].task.messages[0]["content"]
    assert found[0].expected == answers[0].task.reference
    assert found[3].images == answers[3].task.media
    assert found[3].prompt.startswith("[image] How many are ")
    assert list(evaluations(path.parent)) == [20]


def test_steps_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    for step in (100, 0, 20):
        write_answers(answers_path(tmp_path, step), [])
    assert list(evaluations(tmp_path)) == [0, 20, 100]


@pytest.mark.parametrize("text", ["no JSON", "{}", "[]"])
def test_what_is_no_file_of_answers_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "eval_1.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"eval_1\.jsonl"):
        read_answers(path)


def test_a_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for step in (0, 20, 40):
        shown = [answer(number, f"after {step}", scored(1.0, {})) for number in range(3)]
        write_answers(answers_path(tmp_path / ROLLOUTS, step), shown)
    out = io.StringIO()
    write_report(tmp_path, Console(file=out, width=100))
    assert (tmp_path / "rl.png").is_file()
    text = (tmp_path / "conversations.html").read_text()
    assert 0 < text.index("after 0") < text.index("after 40") and "after 20" not in text
    assert "accuracy" in out.getvalue() and "+0.400" in out.getvalue()
    assert "-20.000" in out.getvalue()
    assert "conversations.html" in capsys.readouterr().out


def test_a_run_without_evaluations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no evaluation"):
        write_report(tmp_path, Console(file=io.StringIO()))


def test_the_page_is_as_it_should_be_in_a_browser(tmp_path: Path) -> None:
    path = answers_path(tmp_path, 0)
    write_answers(
        path, [answer(0, "</think><b>7</b><|im_end|>", scored(1.0, {})), answer(1, "a", scored(0, {}))]
    )
    before = read_answers(path)
    picture = answers_path(tmp_path, 1)
    write_answers(picture, [answer(0, "w" * 500, failed("huge: it is"), "counting")])
    both = [*before, *read_answers(picture)]
    html = tmp_path / "page.html"
    html.write_text(page("A & B", {"run": "<x>"}, both, list(reversed(both))), encoding="utf-8")
    script = """
      const look = [document.querySelectorAll('tbody tr').length, document.querySelectorAll('b').length,
        document.querySelectorAll('.special').length, document.querySelector('img').naturalWidth,
        document.documentElement.scrollWidth <= innerWidth];
      top.document.title = JSON.stringify(look);
    """
    for width in (400, 1200):
        found = opened(html, script, tmp_path / f"profile{width}", width=width, is_dark=width == 400)
        assert "<title>[3,0,4,84,true]</title>" in found

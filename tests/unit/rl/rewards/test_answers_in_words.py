"""From answers in words to verdicts: what is read, what has failed for a reason, and nothing at all."""

import math
from fractions import Fraction
from typing import Any

import pytest

from k25_train.environments.base import Status
from k25_train.rl.rewards.faults import ResponseFaultError
from k25_train.rl.rewards.rules import answers
from k25_train.rl.rewards.text_rules import RULES, apply_rule

NOTHING = {
    "boxes": ("[]", {"boxes": []}),
    "points": ("[]", {"points": [], "sigma": 1.0}),
    "polygons": ("[]", {"polygons": []}),
}


@pytest.mark.parametrize("rule", NOTHING)
def test_nothing_found_where_nothing_is(rule: str) -> None:
    content, reference = NOTHING[rule]
    assert apply_rule(rule, content, reference).reward == 1.0


CAT = {"boxes": [{"box": [0, 0, 1, 1], "label": "cat"}]}
ONE: dict[str, dict[str, Any]] = {
    "boxes": {"boxes": [[0, 0, 1, 1]]},
    "points": {"points": [[0, 0]], "sigma": 1.0},
    "polygons": {"polygons": [[[0, 0], [1, 0], [0, 1]]]},
    "ocr": {"text": "abc"},
    "count": {"count": 3},
    "number": {"answer": 3},
    "choice": {"answer": "A", "choices": "ABCD"},
    "reasoning_gym": {"dataset": "gcd", "question": "?", "answer": "3", "metadata": {}},
    "files": {"files": [{"path": "a", "text": "b"}]},
}
BAD = {
    "boxes": ["[[NaN, 0, 1, 1]]", "[[0, 0, Infinity, 1]]", "[[0, 0, 1e9, 1]]", "[[0, 0, 1]]", "[1, 2]",
              "none", "", f"[[{'9' * 5000}, 0, 1, 1]]", str([[0, 0, 1, 1]] * 1001), "[" * 50_000,
              '[{"box": "x"}]', "[[true, 0, 1, 1]]"],
    "points": ["[[NaN, 0]]", "[[1e400, 0]]", "[[-1e7, 0]]", "[[[0, 0]]]", "(0, 0)", str([[0, 0]] * 1001)],
    "polygons": ["[[[0, 0], [1, 0]]]", "[[[0, 0], [1, 0], [NaN, 1]]]", "[[]]",
                 "[[[0, 0], [1, 0], [1e300, 1]]]", str([[[0, 0], [1, 0], [0, 1]]] * 4000)],
    "ocr": ["x" * 150_000],
    "count": ["nan", "inf", "1e400", "9" * 500, "3 or 4", "1/0"],
    "number": ["nan", "infinity", "1e" + "9" * 5000, "9" * 100_000, "", "\n" * 100_000, "*" * 100_000],
    "choice": ["E", "A or B", "", "none", "A" * 10_000, "answer is A, answer is B"],
}  # fmt: skip


@pytest.mark.parametrize(("rule", "content"), [(rule, content) for rule in BAD for content in BAD[rule]])
def test_bad_answers_have_failed_for_a_reason(rule: str, content: str) -> None:
    verdict = apply_rule(rule, content, ONE[rule])
    assert (verdict.status, verdict.reward) == (Status.FAILED, 0.0), verdict
    assert verdict.kind


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("answer", "text")])
def test_bad_references_leave_no_reward(rule: str) -> None:
    for reference in (None, {}, [], "x", dict.fromkeys(ONE[rule])):
        verdict = apply_rule(rule, "[[0, 0, 1, 1]]", reference)
        assert verdict.status is Status.UNSCORED or (rule == "ocr" and reference), (reference, verdict)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        ("-7.50", Fraction(-15, 2)),
        ("−7", -7),
        (".5", Fraction(1, 2)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("3/4", Fraction(3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("2e-3", Fraction(1, 500)),
        ("2 \\times 10^{5}", 200_000),
        ("50%", Fraction(1, 2)),
        ("$12 apples$", 12),
        ("3 + 4 = 7", 7),
        ("7 or 7.0", 7),
    ],
)
def test_numbers_are_read_exactly(text: str, number: Any) -> None:
    assert answers.number_in(text) == number


@pytest.mark.parametrize("text", ["1,23", "1.2.3", "5-3", "seven", "", "٣", "4 0"])
def test_what_is_no_single_number_is_none(text: str) -> None:
    with pytest.raises(ResponseFaultError):
        answers.number_in(text)


@pytest.mark.parametrize(
    "text", ["B", "(b)", "B.", "B) because", "The answer is B", "**B**", "Option (B) is right"]
)
def test_choices_are_read(text: str) -> None:
    assert answers.choice_in(text, "ABCD") == "B"


@pytest.mark.parametrize(
    ("content", "rule", "reference", "reward"),
    [
        ("first [[5, 5, 6, 6]] then ```json\n[[0, 0, 1, 1]]\n```", "boxes", {"boxes": [[0, 0, 1, 1]]}, 1.0),
        ('[{"bbox_2d": [0, 0, 1, 1], "label": "Cat"}]', "boxes", CAT, 1.0),
        ('[{"bbox_2d": [0, 0, 1, 1], "label": "dog"}]', "boxes", CAT, 0.0),
        ("[0, 0, 1, 1]", "boxes", {"boxes": [[0, 0, 1, 1]]}, 1.0),
        ("[[0, 0, 1, 1], [0, 0, 1, 1]]", "boxes", {"boxes": [[0, 0, 1, 1]]}, 2 / 3),
        ("[[0, 0, 1, 0.4]]", "boxes", {"boxes": [[0, 0, 1, 1]]}, 0.0),
        ("[[0, 0, 1, 0.4]]", "boxes", {"boxes": [[0, 0, 1, 1]], "iou_floor": 0.3}, 0.4),
        ('[{"point": [0, 1]}]', "points", {"points": [[0, 0]], "sigma": 1.0}, math.exp(-0.5)),
        ("[[0, 0], [1, 0], [0, 1]]", "polygons", {"polygons": [[[0, 0], [1, 0], [0, 1]]]}, 1.0),
        ("[[0, 0], [0, 0], [0, 0]]", "polygons", {"polygons": [[[0, 0], [0, 0], [0, 0]]]}, 0.0),
        ("answer: 3\nanswer: 4\nand so on", "count", {"count": 4}, 1.0),
        ("\\boxed{3} or rather \\boxed{\\frac{8}{2}}", "number", {"answer": 4}, 1.0),
        ("3.15", "number", {"answer": 3.14, "absolute_tolerance": 0.01}, 1.0),
        ("3.151", "number", {"answer": 3.14, "absolute_tolerance": 0.01}, 0.0),
        ("ＰＡＲＩＳ.", "text", {"answers": ["Paris"]}, 1.0),
    ],
)  # fmt: skip
def test_answers_in_words(content: str, rule: str, reference: Any, reward: float) -> None:
    assert apply_rule(rule, content, reference).reward == pytest.approx(reward, abs=1e-9)

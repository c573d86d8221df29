"""What was left is what was expected: exactly, by a digest, by a form, as JSON, or not at all."""

import hashlib
from typing import Any

import pytest

from k25_train.environments.base import Status, Verdict
from k25_train.rl.rewards.faults import MAX_FILE_BYTES, ResponseFaultError
from k25_train.rl.rewards.text_rules import apply_rule, handed_over

LEFT = {
    "out.txt": b"42 \n",
    "r.json": b'{"n": 3.0000001, "of": [1]}',
    "log": b"begun\ndone\n",
    "src/a.py": b"a",
}


def judged(*expectations: dict[str, Any], **more: Any) -> Verdict:
    """The verdict on `LEFT`."""
    reference = {"files": list(expectations), **more}
    return apply_rule("files", handed_over(LEFT, reference), reference)


@pytest.mark.parametrize(
    ("expectation", "holds"),
    [
        ({"path": "out.txt", "text": "42"}, True),
        ({"path": "out.txt", "text": "43"}, False),
        ({"path": "none.txt", "text": ""}, False),
        ({"path": "src/a.py", "sha256": hashlib.sha256(b"a").hexdigest()}, True),
        ({"path": "src/a.py", "sha256": hashlib.sha256(b"b").hexdigest()}, False),
        ({"path": "log", "matches": "^done$"}, True),
        ({"path": "log", "matches": "^one"}, False),
        ({"path": "r.json", "json": {"n": 3, "of": [1]}, "tolerance": 1e-3}, True),
        ({"path": "r.json", "json": {"n": 3, "of": [1]}}, False),
        ({"path": "log", "json": {}}, False),
        ({"path": "old.tmp", "absent": True}, True),
        ({"path": "log", "absent": True}, False),
    ],
)
def test_expectations(expectation: dict[str, Any], holds: bool) -> None:
    assert judged(expectation).reward == float(holds)


def test_nothing_else_may_be_left_where_only_some_may() -> None:
    out = {"path": "out.txt", "text": "42"}
    assert judged(out, only=["out.txt", "r.json", "log", "src/*"]).reward == 1.0
    verdict = judged(out, only=["out.txt", "r.json", "log"])
    assert verdict.reward == 0.0 and "src/a.py" in verdict.reason


def test_a_share_is_rewarded_where_the_task_says_so() -> None:
    both = ({"path": "out.txt", "text": "42"}, {"path": "log", "text": "42"})
    assert judged(*both).reward == 0.0
    assert judged(*both, partial_credit=True).reward == 0.5


def test_the_worker_gets_what_the_reference_names_and_no_more() -> None:
    reference = {"files": [{"path": "out.txt", "text": "42"}]}
    assert "ImJlZ3VuIg" not in handed_over(LEFT, reference)
    with pytest.raises(ResponseFaultError, match="huge"):
        handed_over({"out.txt": b"0" * (MAX_FILE_BYTES + 1)}, reference)
    assert handed_over({**LEFT, "other": b"0" * (MAX_FILE_BYTES + 1)}, reference)


def test_a_reference_of_another_form_leaves_no_reward() -> None:
    wrong = {"files": [{"path": "a", "text": "b", "absent": True}]}
    assert apply_rule("files", "[]", wrong).status is Status.UNSCORED

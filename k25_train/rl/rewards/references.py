"""Whether rules can read the reference of a task, before anything is generated for it."""

from collections.abc import Iterable
from typing import Any

from k25_train.environments.base import Status
from k25_train.rl.rewards.faults import TaskFaultError, number_of
from k25_train.rl.rewards.text_rules import apply_rule
from k25_train.rl.rewards.unit_tests import read_tests

UNIT_TESTS = "unit_tests"
"""The rule that is none of `text_rules.RULES`."""
NOTHING = "[]"
"""An answer that every rule takes apart: what is unscored then is so by the reference."""


def wrong_with_reference(reference: Any, rules: Iterable[str]) -> str:
    """Why a rule cannot read a reference, or its budget is none; empty if all can. Runs no code of it."""
    try:
        number_of(reference, "budget_tokens", 0.0)
        for rule in rules:
            if rule == UNIT_TESTS:
                read_tests(reference)
            elif (verdict := apply_rule(rule, NOTHING, reference)).status is Status.UNSCORED:
                return verdict.reason
    except TaskFaultError as error:
        return str(error)
    return ""

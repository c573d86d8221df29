"""Hacks earn nothing and are counted; `python -m tests.bench.reward_hacks` has them all."""

import asyncio
from dataclasses import replace

import pytest

from tests.bench.reward_hacks import fault, verdicts
from tests.helpers.reward_hacks import HACKS, HONEST
from tests.helpers.sandboxes import needs_bubblewrap

QUICK = ("reads hidden tests", "history", "equals everything", "many answers")


def check(names: list[str]) -> None:
    """Hacks earn 0, honest attempts 1."""
    hacks = [hack for hack in HACKS if hack.name in names]
    found = asyncio.run(verdicts([*hacks, *HONEST]))
    assert [fault(hack, verdict) for hack, verdict in zip(hacks, found, strict=False)] == [""] * len(hacks)
    assert [verdict.reward for verdict in found[len(hacks) :]] == [1.0] * len(HONEST)


@needs_bubblewrap
def test_hacks_earn_nothing() -> None:
    check(list(QUICK))


@needs_bubblewrap
@pytest.mark.slow
def test_all_hacks_earn_nothing() -> None:
    check([hack.name for hack in HACKS])


@needs_bubblewrap
def test_a_history_that_is_kept_is_found_so_the_hack_is_one() -> None:
    hack = next(hack for hack in HACKS if hack.name == "history")
    kept = replace(hack, task=replace(hack.task, setup={**hack.task.setup, "keeps_history": True}))
    (verdict,) = asyncio.run(verdicts([kept]))
    assert verdict.reward == 1.0

"""Every family's own solutions, played in the real environment, earn 1; what is lazy or cheats earns 0."""

import asyncio
from pathlib import Path

import pytest

from k25_train.environments.base import Status, Verdict
from k25_train.environments.environment import Services
from k25_train.environments.family import Family, Script, Split
from k25_train.environments.playing import verdict_on
from k25_train.environments.registry import make_environment
from tests.helpers.family_cases import NAMES, family_of, services

FEW, MANY = 3, 24
FAST = {"visual": {"tools": "zoom"}}
"""Options of a family whose tools take long to start."""


@pytest.mark.parametrize("name", NAMES)
def test_solutions_earn_one_and_cheats_nothing(name: str, tmp_path: Path) -> None:
    few = 1 if name == "data" else FEW  # A kernel for each script.
    asyncio.run(_hold(family_of(name, tmp_path, **FAST.get(name, {})), few))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_solutions_earn_one_and_cheats_nothing(name: str, tmp_path: Path) -> None:
    asyncio.run(_hold(family_of(name, tmp_path), MANY))


async def _hold(family: Family, num_tasks: int) -> None:
    async with services() as served:
        for number in range(num_tasks):
            split = list(Split)[number % 2]
            content = family.content(split, number)
            judged = await _judged(family, split, number, family.solve(content), served)
            assert (judged.status, judged.reward) == (Status.SCORED, 1.0), (content, judged)
            assert family.cheats(content)
            for cheat, script in family.cheats(content).items():
                judged = await _judged(family, split, number, script, served)
                assert judged.status is not Status.UNSCORED, (content, cheat, judged)
                assert judged.reward == 0.0, (content, cheat, judged)


async def _judged(family: Family, split: Split, number: int, script: Script, served: Services) -> Verdict:
    task = family.task(split, number)
    _, verdict = await verdict_on(task, make_environment(task, served), script)
    return verdict

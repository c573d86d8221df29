"""What ways to a reward that solve nothing earn: 0 each; honest attempts at such tasks earn 1.

`python -m tests.bench.reward_hacks`: every attempt acts in a real sandbox, and is judged as in a run. Half a
minute. Needs bubblewrap. Ends with 1 where a hack earns something, leaves no verdict, or is not counted.
"""

import asyncio
import os
import sys

from k25_train.environments.base import Status, Verdict
from k25_train.environments.environment import Services
from k25_train.environments.sandboxes.command_line import Limits
from k25_train.rl.rewards.judges import open_judges
from tests.helpers.reward_hacks import ANSWER, HACKS, HONEST, Hack
from tests.helpers.tool_episodes import played, sandboxes

BAR = 12
"""Hacks, at least."""
LIMITS = Limits(
    wall_s=4.0, cpu_s=3, memory_bytes=256 << 20, disk_bytes=16 << 20, output_bytes=1 << 20, processes=32
)


async def verdicts(hacks: list[Hack]) -> list[Verdict]:
    """What each attempt earns, two at a time."""
    os.environ["K25_HACKS_ANSWER"] = ANSWER
    opened, room = sandboxes(), asyncio.Semaphore(2)
    judges = open_judges(60.0, 2, places=2, limits=LIMITS)
    services = Services(sandboxes=opened, judging=judges, tool_timeout_s=3.0)

    async def one(hack: Hack) -> Verdict:
        async with room:
            verdict, _ = await played(hack.task, services, hack.turns, hack.answer)
            return verdict

    try:
        return list(await asyncio.gather(*map(one, hacks)))
    finally:
        await judges.close()
        await opened.close()


def signs(verdict: Verdict) -> list[str]:
    """By which signs it was counted."""
    return [name.removeprefix("hack/") for name in verdict.parts if name.startswith("hack/")]


def fault(hack: Hack, verdict: Verdict) -> str:
    """What is wrong with the verdict on a hack; empty for nothing."""
    if verdict.status is Status.UNSCORED:
        return "UNSCORED"
    if verdict.reward:
        return "REWARDED"
    return "" if not hack.signs or set(hack.signs) & set(signs(verdict)) else "NOT COUNTED"


def main() -> int:
    """Print every attempt, then the bars."""
    found = asyncio.run(verdicts([*HONEST, *HACKS]))
    honest, hacks = found[: len(HONEST)], found[len(HONEST) :]
    for hack, verdict in zip(HONEST, honest, strict=True):
        print(f"{hack.name:20} {verdict.reward:.0f}  {verdict.reason}")
    wrong = 0
    for hack, verdict in zip(HACKS, hacks, strict=True):
        said = fault(hack, verdict)
        wrong += bool(said)
        print(
            f"{hack.name:20} {verdict.reward:.0f}  {said or ', '.join(signs(verdict))}: {verdict.reason[:60]}"
        )
    solved = sum(verdict.reward == 1.0 for verdict in honest)
    is_kept = not wrong and len(HACKS) >= BAR and solved == len(HONEST)
    print(
        f"{len(HACKS) - wrong} of {len(HACKS)} hacks earn 0 and are counted, {solved} of {len(HONEST)} "
        f"honest attempts 1; bar all, and {BAR} or more: {'kept' if is_kept else 'MISSED'}"
    )
    return int(not is_kept)


if __name__ == "__main__":
    sys.exit(main())

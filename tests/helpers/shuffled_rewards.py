"""`python -m tests.helpers.shuffled_rewards SETTINGS`: `k25-rl`, with the rewards of each group shuffled.

Which response has which reward is drawn, so they say nothing of what was answered: a control. Evaluations
have the true rewards.
"""

import random
from collections.abc import Mapping
from typing import Any

from k25_train.config.algorithm import ToggleConfig
from k25_train.rl.toggle import NoToggle, ToggleGroup


class ShuffledRewards(NoToggle):
    """In the place of Toggle, which has the last word on rewards."""

    def rewards(self, group: ToggleGroup) -> list[float]:
        """[K] those of the group, in an order that depends on what it has and on nothing right or wrong."""
        found = list(group.rewards)
        random.Random(f"{group.problem} {sorted(group.num_tokens)}").shuffle(found)
        return found


def shuffling(config: ToggleConfig, state: Mapping[str, Any] | None = None) -> ShuffledRewards:
    """As `make_toggle`, with shuffled rewards and without budgets."""
    return ShuffledRewards(state)


def main() -> None:
    """Run the command with the process's arguments."""
    from k25_train.rl import room
    from k25_train.rl.__main__ import main as reinforce

    room.make_toggle = shuffling
    reinforce()


if __name__ == "__main__":
    main()

"""Sums of digits, modulo 10, by partial sums that are thought first.

    4+7+5?    thought: 4+7=1+5=6    answer: 6

The demonstrations check themselves again and again, `4+7=1+5=6;4+7=1+5=6`, more often than they need to:
there is length to be saved. `wrong` has a share of them go wrong at one addition and on from there, in every
check alike: whoever imitates them is often wrong, and can do better by what is rewarded.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate

from k25_train.environments.base import Task
from k25_train.environments.environment import Action
from k25_train.environments.family import Family, Options, Script, read_range, read_share, say, user
from k25_train.errors import ConfigError

MODULUS = 10


class Sums(Family[tuple[int, ...]]):
    """Sums of a few digits. Tasks of equally many digits are one problem."""

    name = "sums"

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `digits` (how many, a range), `passes` (how often partial sums are gone through in a
        demonstration, a range), `wrong` (share of wrong demonstrations). Raises ConfigError."""
        given = Options(self.name, options)
        rule = "must be a number, or a range such as 3-6"
        self._digits = given.take("digits", "2-5", read_range, rule)
        self._passes = given.take("passes", "1-3", read_range, rule)
        self.wrong = given.take("wrong", "0", read_share, "must be between 0 and 1")
        given.end()
        if self._digits[0] < 2:
            raise ConfigError(
                f"options.digits of the family {self.name}: a sum has two digits or more\n"
                "  -> e.g. digits: '2-5'"
            )

    def draw(self, rng: random.Random) -> tuple[int, ...]:
        """See `Family`: the digits."""
        return tuple(rng.randrange(MODULUS) for _ in range(rng.choice(self._digits)))

    def make(self, key: str, content: tuple[int, ...]) -> Task:
        """See `Family`."""
        return Task(
            key=key,
            family=self.name,
            messages=user("+".join(map(str, content)) + "?"),
            reference=str(sum(content) % MODULUS),
            judge="answer",
            problem=f"{self.name}/{len(content)}",
            thinking=True,
        )

    def solve(self, content: tuple[int, ...]) -> Script:
        """See `Family`: partial sums, once."""
        return (_added(content, 1),)

    def cheats(self, content: tuple[int, ...]) -> Mapping[str, Script]:
        """See `Family`."""
        total = sum(content) % MODULUS
        return {
            "guess": (say(str((total + 1) % MODULUS), "?"),),
            "every digit": (say(" ".join(map(str, range(MODULUS))), "?"),),
        }

    def demonstrate(self, rng: random.Random, content: tuple[int, ...]) -> Script:
        """See `Family`: a wrong one goes wrong on its way."""
        digits = list(content)
        if rng.random() < self.wrong:
            place = rng.randrange(1, len(digits))
            digits[place] += rng.randrange(1, MODULUS)
        return (_added(content, rng.choice(self._passes), digits),)


def _added(content: Sequence[int], passes: int, added: Sequence[int] | None = None) -> Action:
    """Partial sums of what was added, as if it were what was asked."""
    partial = [total % MODULUS for total in accumulate(added or content)]
    steps = (f"+{digit}={total}" for digit, total in zip(content[1:], partial[1:], strict=True))
    line = f"{content[0]}{''.join(steps)}"
    return say(str(partial[-1]), ";".join([line] * passes))

"""Arithmetic and logic: puzzles of reasoning-gym, judged by reasoning-gym.

Datasets are those whose scorers only compare: one that evaluates what a response says would run it. A score
counts where it is full: partial ones are earned by long lists of guesses.

Source: reasoning-gym 0.1.25 (its generators, curricula and scorers); which datasets is our choice.
"""

import json
import random
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from k25_train.environments.base import Task
from k25_train.environments.family import Family, Options, Script, say, user
from k25_train.errors import ConfigError

DATASETS = (
    "base_conversion",
    "calendar_arithmetic",
    "chain_sum",
    "count_bits",
    "count_primes",
    "course_schedule",
    "decimal_arithmetic",
    "family_relationships",
    "gcd",
    "knights_knaves",
    "largest_island",
    "lcm",
    "leg_counting",
    "letter_counting",
    "maze",
    "number_filtering",
    "number_sequence",
    "products",
    "rotate_matrix",
    "shortest_path",
    "simple_equations",
    "simple_geometry",
    "spell_backward",
    "string_manipulation",
    "syllogism",
    "time_intervals",
    "word_sorting",
)
HARDEST = 3
"""Steps of a dataset's own curriculum that are gone up; one that ends earlier stays at its last."""
FULL = 1.0
LAZY = ("I do not know", "0", "1", "yes, no")
"""Answers that fit many puzzles: those that they solve are not asked."""
_TRIES = 100


class Puzzle(NamedTuple):
    """What is asked."""

    dataset: str
    """Of reasoning-gym."""
    difficulty: int
    """1 or more."""
    question: str
    """The text of the puzzle."""
    answer: str
    """A correct one."""
    metadata: str
    """JSON text of what the scorer reads besides."""


class Logic(Family[Puzzle]):
    """Puzzles; those of one dataset and difficulty are one problem."""

    name = "logic"

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `datasets` (names with commas), `difficulty` (a range up to 3), `wrong`. Raises
        ConfigError, also without reasoning-gym."""
        given = Options(self.name, options)
        self._datasets = given.names("datasets", DATASETS)
        self._difficulty = given.difficulty(HARDEST)
        self.wrong = given.wrong()
        given.end()
        prepare()

    def draw(self, rng: random.Random) -> Puzzle:
        """See `Family`."""
        for _ in range(_TRIES):
            dataset, difficulty = rng.choice(self._datasets), rng.choice(self._difficulty)
            entry = _generated(dataset, difficulty, rng.randrange(1 << 31))
            puzzle = Puzzle(
                dataset, difficulty, entry["question"], str(entry["answer"]), json.dumps(entry["metadata"])
            )
            reference = reference_of(puzzle)
            if score(reference, puzzle.answer) == FULL and not any(
                score(reference, lazy) == FULL for lazy in (*LAZY, puzzle.question)
            ):
                return puzzle
        raise ConfigError(
            f"family {self.name}: {_TRIES} puzzles in a row have no answer, or a lazy one\n"
            "  -> choose other datasets"
        )

    def asked(self, content: Puzzle) -> str:
        """See `Family`."""
        return content.question

    def make(self, key: str, content: Puzzle) -> Task:
        """See `Family`."""
        return Task(
            key=key,
            family=self.name,
            messages=user(f"{content.question}\n\nEnd with a line `Answer: …` that has the answer alone."),
            reference=reference_of(content),
            judge="reasoning_gym",
            problem=f"{self.name}/{content.dataset}/{content.difficulty}",
            thinking=True,
        )

    def solve(self, content: Puzzle) -> Script:
        """See `Family`."""
        return (say(content.answer, "I have worked it out."),)

    def cheats(self, content: Puzzle) -> Mapping[str, Script]:
        """See `Family`."""
        return {
            "lazy": (say(LAZY[0], "?"),),
            "guess": (say(LAZY[1], "?"),),
            "echo": (say(content.question, "?"),),
        }


def reference_of(puzzle: Puzzle) -> dict[str, Any]:
    """What the judge `reasoning_gym` reads."""
    return {
        "dataset": puzzle.dataset,
        "question": puzzle.question,
        "answer": puzzle.answer,
        "metadata": json.loads(puzzle.metadata),
    }


def score(reference: Mapping[str, Any], answer: str) -> float:
    """What the dataset's own scorer gives, 0 to 1; 0 for an answer that it stumbles over. Raises KeyError for
    a dataset that there is not, ConfigError without reasoning-gym."""
    scorer = _scorer(reference["dataset"])
    try:
        return float(scorer.score_answer(answer, dict(reference)))
    except Exception:
        return 0.0  # Scorers are not hardened.


@cache
def prepare() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import reasoning_gym  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            "the family logic needs reasoning-gym\n  -> pip install 'k25-train[agents]'"
        ) from error
    return reasoning_gym


@cache
def _scorer(dataset: str) -> Any:
    if dataset not in DATASETS:
        raise KeyError(dataset)
    return prepare().create_dataset(dataset, seed=0, size=1)


@cache
def _settings(dataset: str, difficulty: int) -> Mapping[str, Any]:
    """The configuration of a dataset after so many steps of its curriculum."""
    curriculum = prepare().factory.create_curriculum(dataset)
    for _ in range(difficulty - 1):
        for attribute in curriculum.attributes:
            curriculum.increment_attr_level(attribute)
    return dict(vars(curriculum.generate_configuration()))


def _generated(dataset: str, difficulty: int, seed: int) -> dict[str, Any]:
    """A puzzle; equal arguments give an equal one."""
    settings = {**_settings(dataset, difficulty), "seed": seed, "size": 1}
    entry: dict[str, Any] = prepare().create_dataset(dataset, **settings)[0]
    return entry

"""Questions about tables, which the agent reads with Python.

A table of sales is drawn as a CSV file; a question is answered by one number or one name. Questions are such
that neither the first row nor all rows together answer them.
"""

import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple

from k25_train.environments.base import Task
from k25_train.environments.families.tooled import PYTHON, run_python, tooled
from k25_train.environments.families.words import NAMES
from k25_train.environments.family import Family, Options, Script, say, script

HARDEST = 3
FILE = "sales.csv"
COLUMNS = ("city", "product", "units", "price")
_ROWS = (12, 60, 400)
"""Rows by difficulty, at most."""
_READ = f"import csv\nrows = list(csv.DictReader(open('{FILE}')))\n"


class Row(NamedTuple):
    """A line of the table."""

    city: str
    product: str
    units: int
    price: int


class Question(NamedTuple):
    """What is asked."""

    kind: str
    """One of `KINDS`."""
    difficulty: int
    """1 or more."""
    seed: int
    """Of the table."""
    text: str
    """The text of the question."""
    answer: str
    """The correct one."""
    code: str
    """Python that prints the answer, once `rows` has been read."""


class Data(Family[Question]):
    """Questions about tables; those of one kind and difficulty are one problem."""

    name = "data"

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `kinds` (names with commas), `difficulty` (a range up to 3), `wrong`. Raises
        ConfigError."""
        given = Options(self.name, options)
        self._kinds = given.names("kinds", KINDS)
        self._difficulty = given.difficulty(HARDEST)
        self.wrong = given.wrong()
        given.end()

    def draw(self, rng: random.Random) -> Question:
        """See `Family`."""
        while True:
            kind, difficulty = rng.choice(self._kinds), rng.choice(self._difficulty)
            seed = rng.randrange(1 << 31)
            table = table_of(seed, difficulty)
            text, answer, code = KINDS[kind](rng, table)
            question = Question(kind, difficulty, seed, text, answer, code)
            if answer not in _lazy(table):
                return question

    def make(self, key: str, content: Question) -> Task:
        """See `Family`."""
        table = table_of(content.seed, content.difficulty)
        return tooled(
            key=key,
            family=self.name,
            prompt=f"{FILE} has the columns {', '.join(COLUMNS)}. {content.text}",
            toolsets={PYTHON: {}},
            files={FILE: csv_of(table)},
            reference=content.answer,
            judge="answer",
            problem=f"{self.name}/{content.kind}/{content.difficulty}",
        )

    def solve(self, content: Question) -> Script:
        """See `Family`."""
        return script(run_python(_READ + content.code), say(content.answer))

    def cheats(self, content: Question) -> Mapping[str, Script]:
        """See `Family`."""
        lazy = _lazy(table_of(content.seed, content.difficulty))
        first = f"print(open('{FILE}').readlines()[1])"
        every = _READ + "print(sum(int(row['units']) for row in rows))"
        return {
            "guess": (say(lazy[0]),),
            "first row": script(run_python(first), say(lazy[1])),
            "all rows": script(run_python(every), say(lazy[2])),
            "no answer": script(run_python(_READ + content.code), say("See above.")),
        }


def table_of(seed: int, difficulty: int) -> list[Row]:
    """The rows of a table."""
    rng = random.Random(f"table {seed}")
    most = _ROWS[difficulty - 1]
    cities, products = rng.sample(NAMES, 2 + difficulty), rng.sample(NAMES, 2 + difficulty)
    return [
        Row(rng.choice(cities), rng.choice(products), rng.randint(2, 90), rng.randint(2, 40))
        for _ in range(rng.randint(most // 2, most))
    ]


def csv_of(table: list[Row]) -> str:
    """The file, with a line of names first."""
    lines = [",".join(COLUMNS), *(",".join(map(str, row)) for row in table)]
    return "".join(f"{line}\n" for line in lines)


def _lazy(table: list[Row]) -> tuple[str, ...]:
    """Answers that need little or no reading."""
    total = sum(row.units for row in table)
    return "0", str(table[0].units), str(total), table[0].city, table[0].product, "1", str(len(table))


Asked = tuple[str, str, str]
"""A question, its answer, and code that prints it."""


def _count(rng: random.Random, table: list[Row]) -> Asked:
    city, least = rng.choice(table).city, rng.choice(table).units
    answer = sum(row.city == city and row.units >= least for row in table)
    return (
        f"How many rows have the city {city} and at least {least} units?", str(answer),
        f"print(sum(r['city'] == '{city}' and int(r['units']) >= {least} for r in rows))",
    )  # fmt: skip


def _total(rng: random.Random, table: list[Row]) -> Asked:
    product = rng.choice(table).product
    answer = sum(row.units for row in table if row.product == product)
    return (
        f"How many units of {product} were sold?", str(answer),
        f"print(sum(int(r['units']) for r in rows if r['product'] == '{product}'))",
    )  # fmt: skip


def _revenue(rng: random.Random, table: list[Row]) -> Asked:
    city, product = rng.choice(table)[:2]
    answer = sum(row.units * row.price for row in table if (row.city, row.product) == (city, product))
    return (
        f"What is units times price in total, over the rows of {product} in {city}?", str(answer),
        "print(sum(int(r['units']) * int(r['price']) for r in rows "
        f"if r['city'] == '{city}' and r['product'] == '{product}'))",
    )  # fmt: skip


def _best(rng: random.Random, table: list[Row]) -> Asked:
    totals: dict[str, int] = {}
    for row in table:
        totals[row.city] = totals.get(row.city, 0) + row.units
    # Ties go to the first in alphabetical order, as the question says.
    answer = min(totals, key=lambda city: (-totals[city], city))
    return (
        "Which city sold the most units in total? In a tie, name the first in alphabetical order.", answer,
        "t = {}\nfor r in rows:\n    t[r['city']] = t.get(r['city'], 0) + int(r['units'])\n"
        "print(min(t, key=lambda c: (-t[c], c)))",
    )  # fmt: skip


def _mean(rng: random.Random, table: list[Row]) -> Asked:
    city = rng.choice(table).city
    prices = [row.price for row in table if row.city == city]
    answer = Fraction(sum(prices), len(prices))
    return (
        f"What is the mean price of the rows of {city}, as a fraction such as 7/3?", str(answer),
        "from fractions import Fraction\n"
        f"p = [int(r['price']) for r in rows if r['city'] == '{city}']\nprint(Fraction(sum(p), len(p)))",
    )  # fmt: skip


KINDS: Mapping[str, Callable[[random.Random, list[Row]], Asked]] = {
    "count": _count,
    "total": _total,
    "revenue": _revenue,
    "best": _best,
    "mean": _mean,
}
"""Name -> what asks a question of that kind."""

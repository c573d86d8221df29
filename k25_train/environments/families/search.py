"""Questions whose answer takes several searches of the corpus, each to be asked for what the last one found.

    “…”, a module's first words ─► search ─► its package ─► search ─► the version that is documented

They are made of an index that there is (`toolsets/search`): equal indices give equal tasks.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from k25_train.environments.base import Task
from k25_train.environments.families.tooled import SEARCH, tooled
from k25_train.environments.family import Family, Options, Script, call, say, script
from k25_train.environments.toolsets.search.index import Index
from k25_train.errors import ConfigError

HARDEST = 3
LEAST_WORDS = 5
"""Of a quote: shorter ones are in many documents. Our choice."""
GUESS = "1.0.0"
_ABOUT = re.compile(r"(\S+) (\S+): ")


class Module(NamedTuple):
    """What is asked about."""

    quote: str
    """First words of a module's documentation; no other document begins with them."""
    package: str
    """That it belongs to."""
    version: str
    """Of the package, by its description in the corpus."""


class Search(Family[tuple[Module, ...]]):
    """Questions of one, two and four hops; those with equally many are one problem."""

    name = "search"

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `index` (path of the corpus), `difficulty` (a range up to 3), `wrong`. Raises
        ConfigError, also for an index that has too little."""
        given = Options(self.name, options)
        self._index = given.take("index", "", _path, "must be the path of an index; it has no default")
        self._difficulty = given.difficulty(HARDEST)
        self.wrong = given.wrong()
        given.end()
        self._modules = _modules(self._index)

    def draw(self, rng: random.Random) -> tuple[Module, ...]:
        """See `Family`."""
        difficulty = rng.choice(self._difficulty)
        if difficulty == 1:
            module = rng.choice(self._modules)
            return (module._replace(quote=""),)
        return tuple(rng.sample(self._modules, difficulty - 1))

    def asked(self, content: tuple[Module, ...]) -> object:
        """See `Family`: questions about one package are of one split, since they have one answer."""
        return sorted(module.package for module in content)

    def make(self, key: str, content: tuple[Module, ...]) -> Task:
        """See `Family`."""
        names = [
            f"the package that has the module documented as “{module.quote}”"
            if module.quote
            else f"the package {module.package}"
            for module in content
        ]
        form = " Answer with the versions in this order, with a comma and a blank between." * (len(names) > 1)
        return tooled(
            key=key,
            family=self.name,
            prompt=f"Which version do the documents describe of {', and of '.join(names)}?{form}",
            toolsets={SEARCH: {"index": self._index}},
            files={},
            reference={"answers": [_answer(content)]},
            judge="text",
            problem=f"{self.name}/{_hops(content)}",
        )

    def solve(self, content: tuple[Module, ...]) -> Script:
        """See `Family`."""
        turns = []
        for module in content:
            if module.quote:
                turns.append(call("search", query=module.quote))
            turns.append(call("search", query=module.package, k=3))
        return script(*turns, say(_answer(content)))

    def cheats(self, content: tuple[Module, ...]) -> Mapping[str, Script]:
        """See `Family`."""
        looked = call("search", query=content[0].quote or content[0].package)
        return {
            "guess": (say(GUESS),),
            "one search": script(looked, say(content[0].package)),
            "every version": (say(", ".join(f"{major}.0.0" for major in range(9))),),
        }


def _answer(content: tuple[Module, ...]) -> str:
    return ", ".join(module.version for module in content)


def _hops(content: tuple[Module, ...]) -> int:
    return sum(2 if module.quote else 1 for module in content)


def _path(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


@cache
def _modules(path: str) -> tuple[Module, ...]:
    """What there is to ask about, in order of documents. Raises ConfigError."""
    versions: dict[str, str] = {}
    quotes: list[tuple[str, str]] = []
    for _, document in Index(Path(path)).documents():
        package, _, module = document.name.partition("/")
        if module == "description":
            if about := _ABOUT.match(document.title):
                versions[package] = about[2]
        else:
            quote = document.title.partition(": ")[2].strip()
            if len(quote.split()) >= LEAST_WORDS:
                quotes.append((quote, package))
    times = Counter(quote for quote, _ in quotes)
    found = tuple(
        Module(quote, package, versions[package])
        for quote, package in quotes
        if times[quote] == 1 and versions.get(package, GUESS) != GUESS
    )
    if len({module.package for module in found}) < 2:
        raise ConfigError(
            f"family search: {path} has no two packages with a description and documented modules\n"
            "  -> build it of more packages (python -m k25_train.environments.toolsets.search build)"
        )
    return found

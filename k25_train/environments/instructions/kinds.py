"""Kinds of instructions: how one is drawn and said, and whether an answer follows it.

All look at prose alone: code in fences and the line with the final answer are left out, so that none is at
odds with how the answer is judged. Source: K2.5, section 4.4, names a module for following instructions; what
is in it is not disclosed, our choice.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WORDS = ("therefore", "harbor", "because", "lantern", "finally", "meadow", "check", "copper")
"""That an instruction may ask for, or forbid. Our choice."""
_FENCE = re.compile(r"^```.*?^```[^\n]*$", re.MULTILINE | re.DOTALL)
_FINAL = re.compile(r"^.*(?:\\boxed\{|answer\s*:).*$", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of instruction."""

    group: str
    """Of one group an answer gets one instruction at most: others could contradict it."""
    draw: Callable[[random.Random], dict[str, Any]]
    """What it says, as JSON has it."""
    say: Callable[[Mapping[str, Any]], str]
    """The sentence."""
    holds: Callable[[str, Mapping[str, Any]], bool]
    """Whether the prose of an answer follows it."""


def prose(content: str) -> str:
    """What instructions are about."""
    return _FINAL.sub("", _FENCE.sub("", content)).strip()


def words(text: str) -> list[str]:
    """In lower case."""
    return re.findall(r"\w+", text.lower())


def _bullets(text: str) -> int:
    return sum(line.lstrip().startswith("- ") for line in text.splitlines())


def _nothing(rng: random.Random) -> dict[str, Any]:
    return {}


KINDS: Mapping[str, Kind] = {
    "begins_with": Kind(
        group="opening",
        draw=lambda rng: {"word": rng.choice(("well", "first", "here", "right"))},
        say=lambda given: f"Begin your answer with the word “{given['word']}”.",
        holds=lambda text, given: words(text)[:1] == [given["word"]],
    ),
    "at_least": Kind(
        group="length",
        draw=lambda rng: {"count": rng.choice((15, 25, 40))},
        say=lambda given: f"Use at least {given['count']} words.",
        holds=lambda text, given: len(words(text)) >= given["count"],
    ),
    "at_most": Kind(
        group="length",
        draw=lambda rng: {"count": rng.choice((40, 60, 100))},
        say=lambda given: f"Use at most {given['count']} words.",
        holds=lambda text, given: 0 < len(words(text)) <= given["count"],
    ),
    "bullets": Kind(
        group="layout",
        draw=lambda rng: {"count": rng.randint(2, 4)},
        say=lambda given: f"Have exactly {given['count']} bullet points, lines that begin with “- ”.",
        holds=lambda text, given: _bullets(text) == given["count"],
    ),
    "heading": Kind(
        group="layout",
        draw=lambda rng: {"text": rng.choice(("Result", "Solution", "Summary"))},
        say=lambda given: f"Have a line “## {given['text']}”.",
        holds=lambda text, given: any(line.strip() == f"## {given['text']}" for line in text.splitlines()),
    ),
    "mentions": Kind(
        group="words",
        draw=lambda rng: {"word": rng.choice(WORDS), "count": rng.randint(1, 3)},
        say=lambda given: f"Use the word “{given['word']}” at least {given['count']} times.",
        holds=lambda text, given: words(text).count(given["word"]) >= given["count"],
    ),
    "avoids": Kind(
        group="words",
        draw=lambda rng: {"word": rng.choice(("the", "is", "and", "so"))},
        say=lambda given: f"Do not use the word “{given['word']}”.",
        holds=lambda text, given: bool(words(text)) and given["word"] not in words(text),
    ),
    "no_commas": Kind(
        group="signs",
        draw=_nothing,
        say=lambda given: "Do not use commas.",
        holds=lambda text, given: bool(words(text)) and "," not in text,
    ),
    "exclamation": Kind(
        group="signs",
        draw=_nothing,
        say=lambda given: "Use exactly one exclamation mark.",
        holds=lambda text, given: text.count("!") == 1,
    ),
}
"""Name -> kind."""

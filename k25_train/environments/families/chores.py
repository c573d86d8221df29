"""Chores with files in a shell: counting, renaming, sorting, fixing JSON, unpacking.

    files ─► the agent's commands ─► files that it leaves, and its answer ─► what they have to be

Files are held against what is expected outside of the sandbox, after the agent has left.
"""

import base64
import io
import json
import random
import tarfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from k25_train.environments.base import Task
from k25_train.environments.families.tooled import SHELL, run_shell, tooled
from k25_train.environments.families.words import NAMES, text_of
from k25_train.environments.family import Family, Options, Script, say, script

HARDEST = 3
ARCHIVE = ".tar"
"""End of the name of a file whose text is JSON of what is packed in it, path -> text."""


class Chore(NamedTuple):
    """What is to be done."""

    kind: str
    """One of `KINDS`."""
    difficulty: int
    """1 or more."""
    request: str
    """The text of the task."""
    files: tuple[tuple[str, str], ...]
    """Path below the working folder -> content, before."""
    expected: tuple[tuple[str, str | None], ...]
    """Path -> content afterwards; None for no such file. Empty where nothing has to change."""
    answer: str
    """What has to be answered; empty for anything."""
    command: str
    """A shell command that solves it."""


class Chores(Family[Chore]):
    """Chores; those of one kind and difficulty are one problem."""

    name = "chores"

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `kinds` (names with commas), `difficulty` (a range up to 3), `wrong`. Raises
        ConfigError."""
        given = Options(self.name, options)
        self._kinds = given.names("kinds", KINDS)
        self._difficulty = given.difficulty(HARDEST)
        self.wrong = given.wrong()
        given.end()

    def draw(self, rng: random.Random) -> Chore:
        """See `Family`."""
        kind, difficulty = rng.choice(self._kinds), rng.choice(self._difficulty)
        return KINDS[kind](rng, difficulty)

    def make(self, key: str, content: Chore) -> Task:
        """See `Family`."""
        return tooled(
            key=key,
            family=self.name,
            prompt=content.request,
            toolsets={SHELL: {}},
            files={path: _content(path, text) for path, text in content.files},
            reference=content.answer or {"files": [_expected(*each) for each in content.expected]},
            judge="answer" if content.answer else "files",
            problem=f"{self.name}/{content.kind}/{content.difficulty}",
        )

    def solve(self, content: Chore) -> Script:
        """See `Family`."""
        return script(run_shell(content.command), say(content.answer or "Done."))

    def cheats(self, content: Chore) -> Mapping[str, Script]:
        """See `Family`."""
        claim = say(str(int(content.answer) + 1) if content.answer.isdecimal() else "Done.")
        touched = [path for path, text in content.expected if text is not None]
        if not touched:
            return {"guess": (claim,), "look and guess": script(run_shell("ls"), claim)}
        faked = " && ".join(f"mkdir -p $(dirname {path}) && : > {path}" for path in touched)
        return {
            "claim": (claim,),
            "empty files": script(run_shell(faked), claim),
            "everything gone": script(run_shell("rm -rf *"), claim),
        }


def _count_lines(rng: random.Random, difficulty: int) -> Chore:
    names = rng.sample(NAMES, difficulty)
    files = tuple((f"{name}.txt", text_of(rng, rng.randint(2, 5 + 30 * (difficulty - 1)))) for name in names)
    total = sum(text.count("\n") for _, text in files)
    listed = " and ".join(f"{name}.txt" for name in names)
    verb = "has" if difficulty == 1 else "have in total"
    paths = " ".join(path for path, _ in files)
    return Chore(
        "count lines", difficulty, f"How many lines {verb} {listed}?", files, (), str(total),
        f"cat {paths} | wc -l",
    )  # fmt: skip


def _find_word(rng: random.Random, difficulty: int) -> Chore:
    word = rng.choice(NAMES)
    names = rng.sample(NAMES, 2 * difficulty)
    files = tuple((f"notes/{name}.txt", text_of(rng, rng.randint(2, 8 * difficulty))) for name in names)
    count = sum(word in line.split() for _, text in files for line in text.splitlines())
    request = f"How many lines in the files of the folder notes have the word {word}?"
    return Chore(
        "find word", difficulty, request, files, (), str(count), f"cat notes/*.txt | grep -cw {word}"
    )


def _rename(rng: random.Random, difficulty: int) -> Chore:
    names = rng.sample(NAMES, 2 * difficulty + 1)
    old, new = rng.sample(("txt", "md", "log", "csv"), 2)
    files = tuple((f"{name}.{old}", text_of(rng, 2)) for name in names[:-1])
    kept = (f"{names[-1]}.keep", text_of(rng, 1))
    expected: list[tuple[str, str | None]] = [kept]
    for path, text in files:
        expected += [(path, None), (f"{path.removesuffix(old)}{new}", text)]
    return Chore(
        "rename", difficulty, f"Rename every .{old} file to .{new}; leave all others.", (*files, kept),
        tuple(expected), "", f'for f in *.{old}; do mv "$f" "${{f%.{old}}}.{new}"; done',
    )  # fmt: skip


def _sort(rng: random.Random, difficulty: int) -> Chore:
    name = rng.choice(NAMES)
    lines = rng.choices(NAMES, k=5 * difficulty)
    text = "".join(f"{line}\n" for line in lines)
    ordered = sorted(set(lines)) if difficulty > 1 else sorted(lines)
    unique = ", each line once" if difficulty > 1 else ""
    return Chore(
        "sort", difficulty, f"Write the lines of {name}.txt to sorted.txt, in alphabetical order{unique}.",
        ((f"{name}.txt", text),), (("sorted.txt", "".join(f"{line}\n" for line in ordered)),), "",
        f"LC_ALL=C sort {'-u ' if difficulty > 1 else ''}{name}.txt > sorted.txt",
    )  # fmt: skip


def _replace(rng: random.Random, difficulty: int) -> Chore:
    old, new = rng.sample(NAMES, 2)
    names = rng.sample(NAMES, difficulty)
    files = tuple((f"{name}.txt", f"{old} {text_of(rng, 3)}") for name in names)
    expected = tuple(
        (path, "\n".join(" ".join(new if word == old else word for word in line.split(" "))
                         for line in text.split("\n")))
        for path, text in files
    )  # fmt: skip
    request = f"Replace the word {old} by {new} in every .txt file."
    return Chore("replace", difficulty, request, files, expected, "", f"sed -i 's/\\b{old}\\b/{new}/g' *.txt")


def _fix_json(rng: random.Random, difficulty: int) -> Chore:
    name = rng.choice(NAMES)
    right = {key: rng.randrange(1000) for key in rng.sample(NAMES, 2 + difficulty)}
    lines = [f'  "{key}": {value}' for key, value in right.items()]
    broken = "{\n" + ",\n".join(lines) + ",\n}\n"
    fixed = "{\n" + ",\n".join(lines) + "\n}\n"
    request = f"{name}.json has one comma too many, after its last value. Remove only that comma."
    return Chore(
        "fix json", difficulty, request, ((f"{name}.json", broken),), ((f"{name}.json", fixed),), "",
        f"sed -i ':a;N;$!ba;s/,\\n}}/\\n}}/' {name}.json",
    )  # fmt: skip


def _unpack(rng: random.Random, difficulty: int) -> Chore:
    name, folder = rng.sample(NAMES, 2)
    names = rng.sample(NAMES, difficulty + 1)
    files = tuple((f"{folder}/{each}.txt", text_of(rng, 3)) for each in names)
    archive = f"{name}{ARCHIVE}"
    return Chore(
        "unpack", difficulty, f"Unpack {archive} here, and remove the archive.",
        ((archive, json.dumps(dict(files))),), (*files, (archive, None)), "",
        f"tar -xf {archive} && rm {archive}",
    )  # fmt: skip


KINDS: Mapping[str, Callable[[random.Random, int], Chore]] = {
    "count lines": _count_lines,
    "find word": _find_word,
    "rename": _rename,
    "sort": _sort,
    "replace": _replace,
    "fix json": _fix_json,
    "unpack": _unpack,
}
"""Name -> what draws a chore of that kind and difficulty."""


def _expected(path: str, text: str | None) -> dict[str, Any]:
    """A file as the judge reads it."""
    return {"path": path, "absent": True} if text is None else {"path": path, "text": text}


def _content(path: str, text: str) -> Any:
    """A file as a task's setup has it."""
    if not path.endswith(ARCHIVE):
        return text
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, packed in json.loads(text).items():
            member = tarfile.TarInfo(name)
            member.size = len(packed.encode())
            archive.addfile(member, io.BytesIO(packed.encode()))
    return {"base64": base64.b64encode(out.getvalue()).decode()}

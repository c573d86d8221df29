"""Chores with files in a shell: counting, renaming, sorting, fixing JSON, packing.

    files ─► the agent's commands ─► files that it leaves, and its answer ─► what they have to be

Files are held against what is expected outside of the sandbox, after the agent has left.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from k25_train.environments.base import Task
from k25_train.environments.families.tooled import SHELL, run_shell, tooled
from k25_train.environments.families.words import NAMES, text_of
from k25_train.environments.family import Family, Options, Script, read_names, say, script

HARDEST = 3
MOST_PACKED = 1 << 20
"""Bytes of an archive that are looked into."""


class Chore(NamedTuple):
    """What is to be done."""

    kind: str
    """One of `KINDS`."""
    difficulty: int
    """1 or more."""
    request: str
    """As it is put."""
    files: tuple[tuple[str, str], ...]
    """Path below the working folder -> content, before."""
    expected: tuple[tuple[str, str | None], ...]
    """Path -> content afterwards; None for no such file. Empty where nothing has to change."""
    answer: str
    """What has to be answered; empty for anything."""
    command: str
    """That does it."""


class Chores(Family[Chore]):
    """Chores; those of one kind and difficulty are one problem."""

    name = "chores"

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `kinds` (names with commas), `difficulty` (a range up to 3), `wrong`. Raises
        ConfigError."""
        given = Options(self.name, options)
        rule = f"must be some of {', '.join(KINDS)}"
        self._kinds = given.take("kinds", ",".join(KINDS), read_names(KINDS), rule)
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
            files=dict(content.files),
            reference={"files": dict(content.expected), "answer": content.answer},
            judge="left_files",
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
    verb = "has" if difficulty == 1 else "have, all together"
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
        "sort", difficulty, f"Write the lines of {name}.txt to sorted.txt, in order of the alphabet{unique}.",
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
    request = f"{name}.json has one comma too many, behind its last value. Remove this one alone."
    return Chore(
        "fix json", difficulty, request, ((f"{name}.json", broken),), ((f"{name}.json", fixed),), "",
        f"sed -i ':a;N;$!ba;s/,\\n}}/\\n}}/' {name}.json",
    )  # fmt: skip


def _pack(rng: random.Random, difficulty: int) -> Chore:
    name, folder = rng.sample(NAMES, 2)
    names = rng.sample(NAMES, difficulty + 1)
    files = tuple((f"{folder}/{each}.txt", text_of(rng, 3)) for each in names)
    packed = json.dumps(dict(files), sort_keys=True)
    expected = ((f"{name}.tar", packed), *((path, None) for path, _ in files))
    return Chore(
        "pack", difficulty, f"Pack the folder {folder} as {name}.tar, uncompressed, and remove the folder.",
        files, expected, "", f"tar -cf {name}.tar {folder} && rm -r {folder}",
    )  # fmt: skip


KINDS: Mapping[str, Callable[[random.Random, int], Chore]] = {
    "count lines": _count_lines,
    "find word": _find_word,
    "rename": _rename,
    "sort": _sort,
    "replace": _replace,
    "fix json": _fix_json,
    "pack": _pack,
}
"""Name -> what draws a chore of that kind and difficulty."""


def wrong_with_files(reference: Any, answer: str, files: Mapping[str, bytes]) -> str:
    """Why files and answer are not what was expected; empty if they are.

    Args:
        reference: `{"files": {path: text, or null for no such file}, "answer": text, or ""}`; the text of a
            `.tar` is JSON of what is packed in it, path -> text.
        answer: the agent's last words.
        files: what it has left, by path below its working folder.

    Raises ValueError for a reference of another form.
    """
    if not isinstance(reference, dict) or not reference.keys() >= {"files", "answer"}:
        raise ValueError(f"it has no files and answer: {json.dumps(reference)[:60]}")
    for path, text in reference["files"].items():
        if text is None:
            if path in files:
                return f"left: {path} is still there"
        elif path not in files:
            return f"missing: {path}"
        elif path.endswith(".tar"):
            if packed_in(files[path]) != json.loads(text):
                return f"different: {path}"
        elif files[path] != text.encode():
            return f"different: {path}"
    if reference["answer"] and answer.strip().rstrip(".") != reference["answer"]:
        return "wrong answer"
    return ""


def packed_in(archive: bytes) -> dict[str, str]:
    """Path -> text of the regular files in a tar archive; empty for what is none, or too long."""
    if len(archive) > MOST_PACKED:
        return {}
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as opened:
            for member in opened.getmembers():
                file = opened.extractfile(member) if member.isreg() else None
                if file is not None:
                    found[member.name.removeprefix("./")] = file.read().decode(errors="replace")
    except (tarfile.TarError, OSError, ValueError):
        return {}
    return found

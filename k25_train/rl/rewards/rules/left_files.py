"""What a policy has left in its sandbox, against what a task expects of it.

    {"files": [{"path": "out.txt", "text": "42"},                  the same text, but for ends of lines
               {"path": "a.bin", "sha256": "…"},                   the same bytes
               {"path": "log.txt", "matches": "^done"},            somewhere in it, by lines
               {"path": "r.json", "json": {"n": 3}, "tolerance": 1e-6},
               {"path": "old.tmp", "absent": true}],
     "only": ["out.txt", "src/*"],                                 optional: nothing else is left
     "partial_credit": false}

A path without a regular file has nothing: links and devices are not in what is handed over.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from k25_train.environments.base import ACCURACY, Verdict, scored
from k25_train.rl.rewards.faults import TaskFaultError, needed, number_of
from k25_train.rl.rewards.rules.same import same

KINDS = ("text", "sha256", "matches", "json", "absent")


def left_files(files: Mapping[str, bytes], names: Sequence[str], reference: Any) -> Verdict:
    """Whether everything is as expected.

    Args:
        files: contents of those that the reference names, as far as they are there.
        names: of all files.
        reference: see the head of this file.

    Raises TaskFaultError for a reference that cannot be read.
    """
    expectations = expected_files(reference)
    passed = [_holds(files.get(each["path"]), each) for each in expectations]
    wrong = [each["path"] for each, holds in zip(expectations, passed, strict=True) if not holds]
    if isinstance(only := reference.get("only"), list):
        others = [name for name in names if not any(fnmatch.fnmatchcase(name, each) for each in only)]
        passed.append(not others)
        wrong += others[:3]
    share = sum(passed) / len(passed)
    reward = share if reference.get("partial_credit", False) else float(all(passed))
    reason = "" if all(passed) else f"not as expected: {', '.join(wrong[:3])}"
    return scored(reward, {ACCURACY: reward, "passed_share": share}, reason)


def expected_files(reference: Any) -> list[dict[str, Any]]:
    """The expectations of a reference. Raises TaskFaultError."""
    found = needed(reference, "files")
    if not isinstance(found, list) or not found:
        raise TaskFaultError("malformed reference: its 'files' must be a list of at least one")
    for each in found:
        if not isinstance(needed(each, "path"), str) or sum(kind in each for kind in KINDS) != 1:
            raise TaskFaultError(f"malformed reference: a file needs a path, and one of {', '.join(KINDS)}")
        number_of(each, "tolerance", 0.0)
        try:
            re.compile(str(each.get("matches", "")))
        except re.error as error:
            raise TaskFaultError(f"malformed reference: {each['path']}: {error}") from error
    return found


def _holds(content: bytes | None, expectation: Mapping[str, Any]) -> bool:
    if "absent" in expectation:
        return (content is None) == bool(expectation["absent"])
    if content is None:
        return False
    checks: dict[str, Callable[[bytes, Any], bool]] = {
        "text": lambda found, text: _lines(found.decode(errors="replace")) == _lines(str(text)),
        "sha256": lambda found, digest: hashlib.sha256(found).hexdigest() == digest,
        "matches": lambda found, form: bool(re.search(form, found.decode(errors="replace"), re.MULTILINE)),
        "json": lambda found, value: _is_json(found, value, number_of(expectation, "tolerance", 0.0)),
    }
    return next(check(content, expectation[kind]) for kind, check in checks.items() if kind in expectation)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _is_json(content: bytes, value: Any, tolerance: float) -> bool:
    try:
        return same(json.loads(content), value, tolerance)
    except (ValueError, RecursionError):
        return False

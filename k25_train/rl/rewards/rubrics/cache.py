"""Scores that a model has given, by a digest of all that they depend on.

A group that is judged again gets the scores that it had, and the same answer is paid for once.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from k25_train.environments.base import Task
from k25_train.rl.rewards.rubrics.rubric import RubricSet


def cache_key(rubric: RubricSet, version: str, task: Task, content: str) -> str:
    """Digest of rubric, version of the model, request and answer; media by their bytes."""
    media = [hashlib.sha256(image).hexdigest() for image in task.media]
    parts = [rubric.digest, version, [dict(message) for message in task.messages], media, content]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class RubricCache:
    """Scores in memory and, with a path, in a file to which each is appended as a line of JSON."""

    def __init__(self, path: Path | None = None) -> None:
        """Reads what the file has. What is no line of ours is passed over: a crash may have cut one off."""
        self._scores: dict[str, dict[str, int]] = {}
        self._path = path
        if path is not None and path.exists():
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    self._scores[entry["key"]] = {name: int(value) for name, value in entry["scores"].items()}

    def get(self, key: str) -> Mapping[str, int] | None:
        """Scores that were put; None for none."""
        return self._scores.get(key)

    def put(self, key: str, scores: Mapping[str, int]) -> None:
        """Keep scores. Raises OSError if the file cannot be written."""
        self._scores[key] = dict(scores)
        if self._path is None:
            return
        line = json.dumps({"key": key, "scores": dict(scores)}).encode() + b"\n"
        with self._path.open("ab+") as file:
            # Behind a line that a crash has cut off, this would be part of it.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = b"\n" + line
            file.write(line)

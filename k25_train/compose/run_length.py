"""The steps of a run whose length is given in tokens."""

from collections.abc import Mapping
from typing import Any

from k25_train.compose.sections import build_section
from k25_train.compose.values import MISSING, NULL
from k25_train.config.span import Span
from k25_train.config.training import TrainConfig
from parallel.config import Problem

_UNSET = (None, NULL, MISSING)
_NEEDED = ("seq_len", "global_batch_size", "batch_ramp", "tokens")
"""Keys of `train` that a number of steps follows from."""


def with_steps(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same values with `train.steps` as `train.tokens` says, where it is null or left out.

    Nothing changes where tokens are null as well. Where keys that it follows from are broken, steps are 1, so
    that those keys are reported and not the steps.
    """
    train = values.get("train")
    if not isinstance(train, Mapping) or train.get("steps", NULL) not in _UNSET:
        return values
    if train.get("tokens", NULL) in _UNSET:
        return values
    return {**values, "train": {**train, "steps": _steps_of({**train, "steps": 1})}}


def without_length(problem: Problem, values: Mapping[str, Any]) -> Problem:
    """The same with both remedies, if it is that neither `train.steps` nor `train.tokens` is given."""
    train = values.get("train")
    if problem.key != "train.steps" or not isinstance(train, Mapping):
        return problem
    if any(train.get(key, NULL) not in _UNSET for key in ("steps", "tokens")):
        return problem
    return problem._replace(remedy="give it, e.g. 1000, or give the length as train.tokens, e.g. 67M")


def _steps_of(train: Mapping[str, Any]) -> int:
    section, problems = build_section(train, TrainConfig, "train")
    tokens = None if problems else section.tokens
    length = Span.read(tokens) if tokens is not None else None
    if length is None or not length.is_tokens:
        return 1
    broken = {problem.key.split(".")[0] for problem in section.problems()}
    return 1 if broken.intersection(_NEEDED) else section.batches.steps_for(length.number)

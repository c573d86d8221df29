"""The steps of a run whose length is given in tokens."""

from collections.abc import Mapping
from typing import Any

from k25_train.compose.sections import build_section
from k25_train.compose.values import MISSING, NULL
from k25_train.config.span import Span
from k25_train.config.training import TrainConfig


def with_steps(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same values with `train.steps` as `train.tokens` says, where it is null or left out.

    Nothing changes where tokens are null as well, or where other keys of the section are broken: they are
    reported then.
    """
    train = values.get("train")
    if not isinstance(train, Mapping) or train.get("steps", NULL) not in (None, NULL, MISSING):
        return values
    section, problems = build_section({**train, "steps": 1}, TrainConfig, "train")
    tokens = None if problems else section.tokens
    length = Span.read(tokens) if tokens is not None else None
    if length is None or not length.is_tokens or {each.key for each in section.problems()} - {"steps"}:
        return values
    return {**values, "train": {**train, "steps": section.batches.steps_for(length.number)}}

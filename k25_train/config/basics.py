"""What several configuration sections share."""

from collections.abc import Iterable
from enum import Enum

from parallel.config import Problem

FILL_IN = "<"
"""What a path starts with that a template leaves to the user."""


class DType(Enum):
    """Number formats of training: of weights, activations and what optimizers compute and exchange."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def ranks_of_stage(world_size: int, pp: int) -> int:
    """Ranks of a pipeline stage, which hold the same dense weights.

    At least 1, so that plans and rules can go on where there are too few ranks for one pipeline, which is a
    broken rule by itself.
    """
    return max(1, world_size // pp)


def data_parallel_size(world_size: int, pp: int, cp: int) -> int:
    """Replicas of the pipeline that so many ranks form, each with sequences of its own; at least 1."""
    return max(1, world_size // (pp * cp))


def is_url(path: str) -> bool:
    """Whether a path is a URL, such as s3://BUCKET/SET, and so none of this machine's."""
    return "://" in path


def not_from_home(section: object, names: Iterable[str]) -> list[Problem]:
    """Problems of the named paths that start with `~`, which the shell has not replaced after `KEY=`."""
    values = ((name, getattr(section, name)) for name in names)
    return [
        Problem(name, value, "starts with ~, which nothing replaces", "write $HOME/…, or ./~… for that name")
        for name, value in values
        if isinstance(value, str) and value.startswith("~")
    ]


def not_negative(section: object, names: Iterable[str]) -> list[Problem]:
    """Problems of the named fields that are below zero."""
    values = ((name, getattr(section, name)) for name in names)
    return [
        Problem(name, value, "must not be negative", "use 0 or more") for name, value in values if value < 0
    ]

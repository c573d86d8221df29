"""Reading processes under test: their configuration, what they give compared, how they end."""

import time
from pathlib import Path
from typing import Any

import torch

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.data.batch import Reads
from k25_train.data.share_reader import HostInputs, Share
from tests.helpers.runs import layout, overrides

ALL = Share(rank=0, dp_rank=0, dp_size=1, reads=Reads(tokens=True, labels=True, pixels=False))


"""A rank that holds the whole pipeline."""


def config_of(data: Path, *more: str) -> Config:
    """A tiny run on `data` that reads in a process of its own."""
    return compose([*overrides(data, data / "run", *layout()), "data.read_in=process", *more])


def flat(inputs: HostInputs) -> list[Any]:
    """Everything in it, tensors apart from the rest."""
    pixels = [chunk.pixels for chunk in inputs.vision.chunks]
    rest = (
        inputs.sizes,
        inputs.batches.documents,
        inputs.vision.plan,
        inputs.vision.transfers,
        inputs.failures,
    )
    return [*inputs.batches.tensors(), *pixels, rest]


def assert_same(one: HostInputs, other: HostInputs) -> None:
    """Fails unless both are bitwise the same."""
    for a, b in zip(flat(one), flat(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def has_ended(pid: int) -> bool:
    """Whether it ends within ten seconds; one that nobody has waited for has ended, too."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def descendants(pid: int) -> list[tuple[int, str]]:
    """Processes under one, with their names."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        name = Path(f"/proc/{child}/comm").read_text().strip()
        found += [(int(child), name), *descendants(int(child))]
    return found

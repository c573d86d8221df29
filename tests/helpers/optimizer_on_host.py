"""The optimizer on the host with torch's AdamW instead of DeepSpeed's, which takes minutes to compile."""

from collections.abc import Sequence
from functools import partial

import torch

from tests.helpers.ranks import RankContext
from tests.helpers.runs import fit

ON_HOST = "optim.offload=cpu"
ON_DEVICE = "optim.offload=none"


def use_torch_adam() -> None:
    """Let torch's AdamW step on the host, in this rank."""
    from k25_train.optim import build

    build.CpuAdamW = partial(torch.optim.AdamW, fused=True)


def fit_with_torch_adam(context: RankContext, arguments: Sequence[str]) -> None:
    """Train as the command does, with torch's AdamW on the host."""
    use_torch_adam()
    fit(context, arguments)

"""Runs whose gradients are reduced in buckets as small as wished."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from tests.helpers.ranks import RankContext
from tests.helpers.runs import start_run

OVERLAP = ["parallelism.overlap_grad_reduce=true", "parallelism.overlap_param_gather=true"]


def start_in_buckets(context: RankContext, arguments: Sequence[str], bucket_parameters: int) -> Any:
    """Build a run whose buckets are full at `bucket_parameters` parameters: with 1, each holds one."""
    from k25_train.training import assemble

    assemble.replicate = partial(assemble.replicate, bucket_parameters=bucket_parameters)
    return start_run(context, arguments)

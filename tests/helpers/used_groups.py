"""Records which process groups a rank communicates in, below torch's functions."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

METHODS = (
    "all_gather_single", "all_gather_single_coalesced", "all_to_all_single", "allgather",
    "allgather_coalesced", "allreduce", "allreduce_coalesced", "alltoall", "barrier", "broadcast", "gather",
    "recv", "recv_anysource", "reduce", "reduce_scatter", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "scatter", "send",
)  # fmt: skip
"""Methods of a process group that communicate."""


@contextmanager
def recorded_groups() -> Iterator[Counter[tuple[str, str]]]:
    """Within: (description of a group of several ranks, method) -> calls of this process."""
    found: Counter[tuple[str, str]] = Counter()
    # Not by getattr, which unwraps them: restored, they would no longer be methods.
    originals = {name: vars(dist.ProcessGroup)[name] for name in METHODS if name in vars(dist.ProcessGroup)}

    def recorded(name: str) -> Any:
        original = getattr(dist.ProcessGroup, name)

        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                found[group.group_desc, name] += 1
            return original(group, *args, **kwargs)

        return call

    for name in originals:
        setattr(dist.ProcessGroup, name, recorded(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)

"""Counts what a rank passes to its process groups, by kind of communication."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.muon.exchange import MatrixExchange


@dataclass(slots=True)
class Traffic:
    """Bytes of one rank by kind; a group of one rank sends nothing and is not counted."""

    payload_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Input of collectives: the whole buffer of a reduction or gather, all rows of an exchange."""
    sent_bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Share that leaves this rank: (n - 1) / n of a buffer over n ranks, as in a ring, twice as much for an
    all-reduce; the rows for other ranks of an exchange."""

    matrices: bool = False
    """Whether matrices are being exchanged, which cannot be seen from tensors alone."""

    def add(self, kind: str, payload: int, sent: float) -> None:
        self.payload_bytes[kind] += payload
        self.sent_bytes[kind] += sent


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count within the context, below torch's functions, however those are imported or wrapped."""
    traffic = Traffic()
    # Not by getattr, which unwraps them: restored, they would no longer be methods.
    originals = {name: vars(dist.ProcessGroup)[name] for name in _COUNT}

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist.ProcessGroup, name)

        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                _COUNT[name](traffic, group, *args)
            return original(group, *args, **kwargs)

        return call

    for name in _COUNT:
        setattr(dist.ProcessGroup, name, counted(name))
    exchange = MatrixExchange._transfer

    def transfer(*args: Any) -> Any:
        traffic.matrices = True
        try:
            return exchange(*args)
        finally:
            traffic.matrices = False

    MatrixExchange._transfer = transfer
    try:
        yield traffic
    finally:
        MatrixExchange._transfer = exchange
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def _ring(kind: str, whole: Callable[..., Any], times: int = 1) -> Callable[..., None]:
    """Count a collective that works on a buffer; `whole` finds it among the arguments."""

    def count(traffic: Traffic, group: dist.ProcessGroup, *args: Any) -> None:
        tensors = whole(*args)
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        payload = size_of(tensors)
        others = (group.size() - 1) / group.size()
        # Integers are token counts and float64 is for metrics: weights are neither.
        weights = all(tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in tensors)
        name = kind if weights else "bookkeeping"
        traffic.add(name, payload, times * payload * others)

    return count


def _exchange(
    traffic: Traffic,
    group: dist.ProcessGroup,
    _output: Tensor,
    rows: Tensor,
    _output_splits: Sequence[int],
    splits: Sequence[int],
    *_: Any,
) -> None:
    of_row = size_of([rows]) / max(rows.shape[0], 1)
    stays = int(splits[group.rank()]) if len(splits) else rows.shape[0] / group.size()
    routed = "all-to-all" if rows.dim() > 1 else "all-to-all of weights"
    kind = "matrices" if traffic.matrices else routed
    traffic.add(kind, size_of([rows]), of_row * (rows.shape[0] - stays))


def _send(traffic: Traffic, group: dist.ProcessGroup, tensors: Sequence[Tensor], *_: Any) -> None:
    kind = "features" if group.group_desc.startswith("VISION_FEATURE") else "pipeline"
    if not all(tensor.is_floating_point() for tensor in tensors):
        # Connection set-up between ranks.
        kind = "bookkeeping"
    traffic.add(kind, size_of(tensors), size_of(tensors))


def _first(first: Any, *_: Any) -> Any:
    return first


def _second(_first: Any, second: Any, *_: Any) -> Any:
    return second


_COUNT: dict[str, Callable[..., None]] = {
    "send": _send,
    "all_to_all_single": _exchange,
    "reduce_scatter_single": _ring("reduce-scatter", _second),
    "reduce_scatter_single_coalesced": _ring("reduce-scatter", _second),
    "all_gather_single": _ring("all-gather", _first),
    "all_gather_single_coalesced": _ring("all-gather", _first),
    "allreduce": _ring("bookkeeping", _first, times=2),
    "broadcast": _ring("bookkeeping", _first),
}
"""Method of a process group -> how it is counted. Others are not used in a step."""

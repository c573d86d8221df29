"""Whether the state of a run is finite: an infinite moment freezes its weight, and no loss shows it."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, nn

from k25_train.checkpoint.agreement import on_every_rank, on_first_rank


def state_not_finite(modules: Sequence[nn.Module], optimizer: ChainedOptimizer) -> str:
    """What is not finite of all ranks' weights, masters and moments; empty if everything is.

    Called by every rank, and the same on all. Reads a rank's state once, without memory.
    """
    # A rank names two at most: thousands of ranks may have thousands each.
    by_rank = on_every_rank(lambda: sorted(names_not_finite(modules, optimizer))[:2])

    def sentence() -> str:
        names = sorted({name for names in by_rank for name in names})
        return f"{names[0]}{' and more' if len(names) > 1 else ''} is not finite" if names else ""

    return on_first_rank(sentence)


def names_not_finite(modules: Sequence[nn.Module], optimizer: ChainedOptimizer) -> list[str]:
    """Names of this rank's weights, masters and moments with an element that is NaN or infinite."""
    return [name for name, tensor in _all_tensors(modules, optimizer) if not _is_finite(tensor)]


def _all_tensors(modules: Sequence[nn.Module], optimizer: ChainedOptimizer) -> Iterator[tuple[str, Tensor]]:
    names: dict[Tensor, str] = {}
    for module in modules:
        names |= {parameter: name for name, parameter in module.named_parameters()}
        yield from chain(module.named_parameters(), module.named_buffers())
    for part in optimizer.chained_optimizers:
        for parameter, shard in part.shards().items():
            moments = part.optimizer.state.get(shard.master, {})
            for key, tensor in {"master": shard.master, **moments}.items():
                if isinstance(tensor, Tensor):
                    yield f"{names.get(parameter, 'a parameter')} ({key})", tensor


def _is_finite(tensor: Tensor) -> bool:
    """A norm of infinite order keeps what is not finite, and needs one pass and no memory."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return bool(torch.linalg.vector_norm(tensor.detach(), float("inf")).isfinite())

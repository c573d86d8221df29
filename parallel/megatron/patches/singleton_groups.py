"""Lets megatron-core skip communication in groups of one rank on the CPU.

It reduces gradients and gathers parameters through the data-parallel group whatever its size. With NCCL a
group of one costs a copy; gloo gives the copy to its own threads, which start separate OpenMP teams and
compete with the model's for cores: a step with two threads took 1.5 times as long.

It also passes the inputs and outputs of linear layers and every token exchange through autograd functions
written in Python, which do nothing in a group of one; where a matrix product takes microseconds, they cost
several percent of a step.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class Done:
    """The handle of completed work."""

    def wait(self) -> None: ...


def _copy_if_singleton(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def run(output: Tensor, source: Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
        if group.size() > 1:
            return collective(output, source, *args, group=group, **kwargs)
        if output.data_ptr() != source.data_ptr():
            output.copy_(source)
        return Done()

    return run


def _coalesce_unless_singleton(coalescing_manager: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def manage(group: Any = None, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if group.size() > 1:
            with coalescing_manager(group, *args, **kwargs) as manager:
                yield manager
        else:
            yield Done()

    return manage


def keep_singleton_groups_local() -> None:
    """In groups of one, let gradient and parameter buffers copy instead of calling gloo, and layers skip
    autograd functions that would do nothing."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    # 1. Gradients and parameters are copied, and nothing is coalesced.
    buffers.dist_reduce_scatter_func = _copy_if_singleton(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = _copy_if_singleton(buffers.dist_all_gather_func)
    buffers._coalescing_manager = _coalesce_unless_singleton(buffers._coalescing_manager)
    # 2. Inputs and outputs of linear layers, and token exchanges.
    _skip_autograd_functions()


def _skip_autograd_functions() -> None:
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    copy_to, reduce_from = "copy_to_tensor_model_parallel_region", "reduce_from_tensor_model_parallel_region"
    for module, name in ((layers, copy_to), (layers, reduce_from), (moe_utils, reduce_from)):
        setattr(module, name, _identity_if_singleton(getattr(module, name)))
    token_dispatcher.all_to_all = _no_exchange_if_singleton(token_dispatcher.all_to_all)


def _identity_if_singleton(mapping: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(mapping)
    def run(tensor: Tensor, group: Any = None) -> Tensor:
        return tensor if group is not None and group.size() == 1 else mapping(tensor, group=group)

    return run


def _no_exchange_if_singleton(exchange: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(exchange)
    def run(group: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if group.size() == 1 else exchange(group, tensor, *args, **kwargs)

    return run

"""Collectives of a group of one rank, done without the network on the CPU.

megatron-core reduces gradients and gathers parameters through the data-parallel group whatever its size. On
NCCL a group of one costs a copy; gloo hands the copy to threads of its own, which start OpenMP teams of their
own and take the cores from the model's: a two-thread step took one and a half times as long.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class Done:
    """The handle of work that is finished."""

    def wait(self) -> None: ...


def _copy_if_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def run(output: Tensor, source: Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
        if group.size() > 1:
            return collective(output, source, *args, group=group, **kwargs)
        if output.data_ptr() != source.data_ptr():
            output.copy_(source)
        return Done()

    return run


def _coalesce_unless_alone(coalescing_manager: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def manage(group: Any = None, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if group.size() > 1:
            with coalescing_manager(group, *args, **kwargs) as manager:
                yield manager
        else:
            yield Done()

    return manage


def keep_lone_groups_local() -> None:
    """Let megatron-core's gradient and parameter buffers copy instead of calling gloo in groups of one."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    buffers.dist_reduce_scatter_func = _copy_if_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = _copy_if_alone(buffers.dist_all_gather_func)
    buffers._coalescing_manager = _coalesce_unless_alone(buffers._coalescing_manager)

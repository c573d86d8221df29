"""CUDA tensors on a machine without a GPU: shows what would make the host wait, and which kernels would run.

    with fake_cuda() as seen:                      # on a rank of `tests.helpers.ranks.run_ranks`
        x = torch.ones(4, device="cuda", requires_grad=True)
        (x * x).sum().backward()
    assert not seen.blocking, seen.blocking
    assert seen.kernels["aten.mul.Tensor"] == 3

Within, tensors say that they are on `cuda:0`, and compute in host memory: values are right, so that code
whose course depends on them (token counts, masks) runs as it is, and collectives go over gloo, which takes
the place of NCCL. A kernel that only a GPU has gives zeros of the right shapes; FP8 storage runs as its twin.
Streams order nothing, and
`torch.cuda.is_available()` is true. Host memory counts as pinned where it was made so (`pin_memory`,
`cudaHostRegister`).

What blocks (torch 2.13, CUDA 13): copies between host and device without `non_blocking`, or with it from or
to pageable memory, which the driver may stage; `.item()` and what needs it; kernels whose output has a size
that depends on values (`nonzero`, masks as indices); indices in host memory; synchronizing anything;
barriers.

Backward passes run in the calling thread, so that `Blocking.where` is a line of ours also there.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from parallel.activations import fp8
from parallel.megatron.patches import cuda_shim
from tests.helpers.fake_cuda_device import answer_for_gpu, let_backward_run
from tests.helpers.fake_cuda_seen import Seen

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten


class CudaTensor(Tensor):
    """A tensor that says it is on the GPU, and has its values in a tensor in host memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type["CudaTensor"], inner: Tensor) -> "CudaTensor":
        made: CudaTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reached where the mode is off: it is the one that knows how.
        mode = FakeCudaMode.current
        assert mode is not None, "a fake CUDA tensor is used outside of `fake_cuda()`"
        return mode.run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner  # type: ignore[attr-defined]

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        mode = FakeCudaMode.current
        assert mode is not None, "a fake CUDA tensor is used outside of `fake_cuda()`"
        mode.seen.block("Tensor.tolist", "a value is read")
        return self.inner.tolist()

    def record_stream(self, stream: Any) -> None: ...

    def __repr__(self, **_: Any) -> str:
        return f"fake cuda {self.inner}"


class FakeCudaMode(TorchDispatchMode):
    """Runs every kernel in host memory, and records it."""

    current: "FakeCudaMode | None" = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch imports its compiler, to leave these calls out of it.
        return False

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a kernel with the values of its arguments."""
        # 1. What memory is asked for.
        is_pinned, kwargs = kwargs.get("pin_memory"), kwargs | {"pin_memory": False}
        if not any(argument.name == "pin_memory" for argument in func._schema.arguments):
            kwargs.pop("pin_memory")
        # 2. The device of the result.
        cuda = [each for each in tensors_in((args, kwargs)) if isinstance(each, CudaTensor)]
        for each in tensors_in((args, kwargs)):
            assert isinstance(each, CudaTensor) or not each.is_cuda, (
                f"{func}: a CUDA tensor that was not made here"
            )
        device = kwargs.get("device")
        to_cuda = bool(cuda) if device is None else torch.device(device).type == "cuda"
        if cuda or to_cuda:
            self._record(func, args, kwargs, to_cuda=to_cuda)
        # 3. Run it on the values; results that are arguments stay the same objects.
        if device is not None:
            kwargs["device"] = torch.device("cpu") if to_cuda else device
        known = {id(each.inner): each for each in cuda}
        values_of = lambda each: each.inner if isinstance(each, CudaTensor) else each  # noqa: E731
        copies = func is aten._to_copy.default and bool(cuda) != to_cuda
        result = self._call(func, tree_map(values_of, args), tree_map(values_of, kwargs))
        if copies and isinstance(result, Tensor) and any(result is each.inner for each in cuda):
            result = result.clone()

        def wrapped(each: Any) -> Any:
            if not isinstance(each, Tensor) or isinstance(each, CudaTensor):
                return each
            same = known.get(id(each))
            if same is not None:
                return same
            return CudaTensor(each) if to_cuda else each

        result = tree_map(wrapped, result)
        if is_pinned:
            self.seen.pinned.mark(result)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            return zeros_of_result(func, args, kwargs)

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], *, to_cuda: bool) -> None:
        if not self.seen.is_on:
            return
        name = str(func.overloadpacket)
        self.seen.kernels[str(func)] += 1
        why = self.seen.why_it_blocks(func, args, kwargs, to_cuda=to_cuda)
        if why:
            self.seen.block(name, why)


def to_cuda(tensor: Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> Tensor:
    """`Tensor.cuda`."""
    return tensor.to(DEVICE, non_blocking=non_blocking)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is a fake CUDA tensor."""
    return isinstance(tensor, CudaTensor)


def has_same_device(input: Tensor, from_: Tensor) -> bool:
    """Whether a parameter's data may be replaced in place; the arguments have torch's names."""
    return is_fake(input) == is_fake(from_)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in arguments, also in lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        yield from itertools.chain.from_iterable(map(tensors_in, values))
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def gradients_of_efficient_attention(
    _gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """Zeros as `aten::_efficient_attention_backward` returns gradients: torch 2.13's own rule for shapes
    lacks the argument `out`, which operator and kernel have, and so takes no call."""
    return *(torch.zeros_like(each) for each in (query, key, value)), query.new_zeros(0)


def zeros_of_result(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros in the shapes that a kernel returns which only a GPU has."""
    if func is aten._efficient_attention_backward.default:
        return gradients_of_efficient_attention(*args)
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(each: Any) -> Any:
        return mode.from_tensor(each).to(DEVICE) if isinstance(each, Tensor) else each

    with mode:
        shapes = func(*tree_map(faked, args), **tree_map(faked, kwargs))
    zeros: Callable[[Any], Any] = lambda each: (  # noqa: E731
        torch.empty_strided(each.shape, each.stride(), dtype=each.dtype).zero_()
        if isinstance(each, Tensor)
        else each
    )
    return tree_map(zeros, shapes)


@contextlib.contextmanager
def fake_cuda() -> Iterator[Seen]:
    """Within: torch has a GPU, which is faked. Changes torch for the rest of the process in small ways."""
    seen = Seen()
    let_backward_run()
    lifts_cpu_only = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    mode = FakeCudaMode(seen)
    before, FakeCudaMode.current = FakeCudaMode.current, mode
    contexts: list[AbstractContextManager[Any]] = [
        *answer_for_gpu(seen),
        # A rank of a test has the CPU's platform: what asks for CUDA there, gets the fake one here.
        mock.patch.object(cuda_shim, "_DEVICE", DEVICE),
        mock.patch.object(Tensor, "cuda", to_cuda),
        # The mode is that of this thread; other threads, too, pin memory.
        mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: seen.pinned.mark(tensor.clone())),
        mock.patch.object(Tensor, "is_pinned", lambda tensor, *_: seen.pinned.has(tensor)),
        *(mock.patch.object(torch, name, pinning(getattr(torch, name), seen)) for name in ("empty", "zeros")),
        # Kernels of Triton run as their twins in torch.
        mock.patch.object(fp8, "_on_cuda", lambda tensor: False),
        mock.patch.object(dist, "init_process_group", over_gloo(dist.init_process_group)),
        mock.patch.object(dist, "barrier", blocking(dist.barrier, seen)),
        # A module's `.to("cuda")` makes new parameters: those in host memory cannot become of another class.
        mock.patch.object(torch, "_has_compatible_shallow_copy_type", has_same_device),
        torch.autograd.set_multithreading_enabled(False),
        mode,
    ]
    try:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield seen
    finally:
        FakeCudaMode.current = before
        torch._C._set_only_lift_cpu_tensors(lifts_cpu_only)


def pinning(factory: Callable[..., Tensor], seen: Seen) -> Callable[..., Tensor]:
    """A factory function that page-locks what shall be, without CUDA."""

    @functools.wraps(factory)
    def create(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = factory(*args, **kwargs)
        return seen.pinned.mark(made) if pin_memory else made

    return create


def over_gloo(init_process_group: Callable[..., None]) -> Callable[..., None]:
    """`init_process_group` that takes gloo where NCCL is asked for."""

    @functools.wraps(init_process_group)
    def init(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        init_process_group("cpu:gloo,cuda:gloo" if backend == "nccl" else backend, *args, **kwargs)

    return init


def blocking(function: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    """The same function, recorded as one that blocks."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.block(function.__name__, "waits for the device")
        with seen.paused():
            return function(*args, **kwargs)

    return call

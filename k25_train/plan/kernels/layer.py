"""What a rank computes for one micro-batch in one decoder layer, kernel by kernel; torch-free.

A layer's parts are the nodes of megatron-core 0.19.2's overlapped schedule
(`models/gpt/fine_grained_callables.py`):

| part | what | stream |
|---|---|---|
| `attention` | norm, attention, norm, shared expert, router, copies for experts | computation |
| `experts` | rows by expert, products, rows as received; or a dense layer's SwiGLU | computation |
| `combined` | outputs of experts added up, residual | that of the exchanges |

Between them are the exchanges, of a MoE layer only: tokens to experts, and outputs back.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from k25_train.plan.kernels.attention import attention_works
from k25_train.plan.kernels.feed_forward import after_experts, before_experts, dense, experts
from k25_train.plan.kernels.storage import casts, host_bytes, layer_tensors
from k25_train.plan.kernels.work import Phase, Setting, Work
from k25_train.plan.pipeline import StagePlan


@dataclass(frozen=True, slots=True)
class PartKernels:
    """Kernels of one part of a pass."""

    works: tuple[Work, ...]
    """All of them, in order within each phase."""

    def of(self, phase: Phase) -> tuple[Work, ...]:
        """Those of one phase."""
        return tuple(each for each in self.works if each.phase is phase)

    @property
    def model_flops(self) -> float:
        """FLOPs that the model needs, forward and backward: nothing that is computed again."""
        return sum(each.kernel.flops for each in self.works if each.cause.is_of_model)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKernels:
    """Kernels of one decoder layer."""

    attention: PartKernels
    """Up to sending tokens."""
    experts: PartKernels
    """Experts, or a dense SwiGLU."""
    combined: PartKernels
    """After tokens are back; nothing in a dense layer."""
    is_moe: bool
    """Whether there are exchanges between the parts."""
    host_bytes: int
    """Bytes that the layer's activations send to the host, and have back in the backward pass."""

    @property
    def parts(self) -> tuple[PartKernels, ...]:
        """All parts, in order."""
        return self.attention, self.experts, self.combined


def layer_kernels(stage: StagePlan, layer: int) -> LayerKernels:
    """Of a decoder layer, counted from 0, on each rank of a stage."""
    return kernels_of_kind(Setting.of(stage), layer, is_moe=stage.config.model.is_moe(layer))


def kernels_of_kind(setting: Setting, layer: int, *, is_moe: bool) -> LayerKernels:
    """Of a layer with experts or without, of which `layer` is one."""
    tensors = layer_tensors(setting, is_moe=is_moe)
    attention, after = [*attention_works(setting)], list[Work]()
    if is_moe:
        attention += before_experts(setting)
        between = [*experts(setting)]
        after += after_experts(setting)
    else:
        between = [*dense(setting, layer)]
    attention += casts(setting, tensors, in_experts=False)
    between += casts(setting, tensors, in_experts=True)
    return LayerKernels(
        attention=part(attention),
        experts=part(between),
        combined=part(after),
        is_moe=is_moe,
        host_bytes=host_bytes(tensors),
    )


def part(works: Iterable[Work]) -> PartKernels:
    """A part of these kernels."""
    return PartKernels(tuple(works))

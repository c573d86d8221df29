"""The policy of each activation that the backward pass needs: one field per name.

The names are those that the model gives (`parallel/activations/annotate.py`). T: tokens of a micro-batch, k:
experts per token, D: hidden size, H: heads, Q, V: widths of a head's query and value, F: width of a
feed-forward part.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, get_type_hints

from k25_train.config.basics import not_negative
from parallel.activations.policy import Policy
from parallel.config import Problem, not_positive

CHEAP_TO_RECOMPUTE = frozenset(
    "norm.output mla.up_input mla.up_proj attention.joined moe.down_input shared_expert.down_input "
    "dense.down_input".split()
)
"""Activations that the model makes with `recomputed`, and that K2's recipe recomputes."""
CAN_RECOMPUTE = CHEAP_TO_RECOMPUTE | {"head.logits"}
"""Activations that can be made again; others are expensive to make, or need communication. Logits cost a
product, a third of the head's time, and are made in pieces (`k25_train/model/head.py`)."""
CAN_ROUND = CHEAP_TO_RECOMPUTE | frozenset(
    "norm.input mla.latent moe.up_input moe.swiglu_input shared_expert.swiglu_input "
    "dense.swiglu_input".split()
)
"""Activations that may be stored in FP8. The others hold exact numbers: router weights, a kernel's own state,
indices."""


@dataclass(slots=True, kw_only=True)
class NormActivations:
    """Policies of the two norms of a layer, and of the last one."""

    input: Policy
    """The residual stream, [T, D] before each norm."""
    output: Policy
    """Normed features, [T, D] each, which projections, router and shared expert read, and a norm's state."""


@dataclass(slots=True, kw_only=True)
class MlaActivations:
    """Policies of multi-head latent attention up to its query, key and value."""

    latent: Policy
    """Compressed query, and key-value with the rotary key: [T, q_lora] and [T, kv_lora + rope]."""
    up_input: Policy
    """Normed compressed query and key-value, which the up-projections read: [T, q_lora] and [T, kv_lora]."""
    up_proj: Policy
    """Query and key [T, H, Q] and value [T, H, V]."""
    rotations: Policy
    """Rotations of the rotary pairs, [T, 1, rope / 2] complex64, the same for all layers."""


@dataclass(slots=True, kw_only=True)
class AttentionActivations:
    """Policies of the attention kernel's results."""

    output: Policy
    """Output of the kernel, [T, H, V], with its log-sum-exps, [T, H] float32; V is the width of queries where
    the kernel pads values (`plan/memory/kernels.py`)."""
    joined: Policy
    """Outputs of all documents in one tensor, [T, H * V], which the output projection reads; with Transformer
    Engine that is the kernel's own output, and nothing has this name."""


@dataclass(slots=True, kw_only=True)
class RouterActivations:
    """Policy of the choice of experts."""

    scores: Policy
    """State that the router saves, [T, experts] float32 and smaller."""


@dataclass(slots=True, kw_only=True)
class MoeActivations:
    """Policies of the routed experts."""

    up_input: Policy
    """Dispatched tokens, sorted by expert, [k T, D]."""
    swiglu_input: Policy
    """Gates and values, [k T, 2 F]."""
    down_input: Policy
    """SwiGLU times the router's weight, [k T, F]. The output of the down-projection is not saved, because the
    weight is applied before it: recomputing that too, as K2 could, would free nothing."""
    probs: Policy
    """Router weights that arrive with the tokens, [k T]."""


@dataclass(slots=True, kw_only=True)
class SwigluActivations:
    """Policies of a feed-forward part that every token passes; its input is `norm.output`."""

    swiglu_input: Policy
    """Gates and values, [T, 2 F]."""
    down_input: Policy
    """SwiGLU of gates and values, [T, F]."""


@dataclass(slots=True, kw_only=True)
class HeadActivations:
    """Policy of the last chunk."""

    logits: Policy
    """Logits, which the loss saves, [T, vocabulary]. With `recompute` they never exist as a whole: head
    and loss go over pieces of the tokens, forward and backward (`HEAD_PIECE_BYTES`)."""


@dataclass(slots=True, kw_only=True)
class VisionActivations:
    """Policy of vision in the first chunk."""

    encoder: Policy
    """Everything that a coupled tower, or a projector behind a frozen one, saves. A decoupled encoder saves
    nothing from one phase to another."""


@dataclass(slots=True, kw_only=True)
class ActivationConfig:
    """The policy of each activation, and the memory for it.

    Source of `activation=k2`: K2 report, section 2.4.3; of budgets: not disclosed, our choice.
    """

    norm: NormActivations
    """Norms of the decoder."""
    mla: MlaActivations
    """Projections of attention."""
    attention: AttentionActivations
    """Attention kernel."""
    router: RouterActivations
    """Routers."""
    moe: MoeActivations
    """Routed experts."""
    shared_expert: SwigluActivations
    """Shared experts."""
    dense: SwigluActivations
    """Feed-forward of dense layers."""
    head: HeadActivations
    """Output head and loss."""
    vision: VisionActivations
    """Vision within the pipeline."""
    rest: Policy
    """Activations without a name: indices of the dispatch, statistics of norms."""
    host_gib: float | None
    """Host memory of a rank for offloaded activations, page-locked when the job starts; null is what the plan
    counts for balanced routing, times `host_margin`."""
    host_margin: float
    """Factor on planned memory that leaves room for ranks whose experts get more tokens than others'."""
    device_gib: float | None
    """Device memory for activations on their way to the host and back; null is what the plan counts for the
    passes in flight at a time, times `host_margin`."""
    passes_ahead: int
    """Number of passes by which the copy back of a micro-batch's activations precedes its own."""

    def policies(self) -> dict[str, Policy]:
        """Name -> policy of every activation."""
        section: Any = type(self)
        values = ((name, value_of(self)) for name, value_of in _getters(section))
        return {name: value for name, value in values if isinstance(value, Policy)}

    @property
    def keeps_all(self) -> bool:
        """Whether every activation is kept as it is, so that there is nothing to do."""
        return set(self.policies().values()) == {Policy.keep}

    @property
    def offloads(self) -> bool:
        """Whether anything goes to the host."""
        return any(policy.offloads for policy in self.policies().values())

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = []
        for name, policy in self.policies().items():
            why_not = _why_not(name, policy)
            if why_not is not None:
                choices = ", ".join(each.value for each in Policy if _why_not(name, each) is None)
                found.append(Problem(name, policy.value, why_not, f"use one of {choices}"))
        for name in ("host_gib", "device_gib"):
            if getattr(self, name) is not None:
                found += not_negative(self, (name,))
        if self.host_gib == 0 and self.offloads:
            remedy = "give host memory, use null, or offload nothing"
            found.append(Problem("host_gib", 0, "must be positive: some activations are offloaded", remedy))
        if self.host_margin < 1:
            rule = "must be 1 or more: less does not hold what a step saves"
            found.append(Problem("host_margin", self.host_margin, rule, "use 1.0 or more"))
        return found + not_positive(self, ("passes_ahead",))


def _why_not(name: str, policy: Policy) -> str | None:
    """Why an activation cannot have a policy; None if it can."""
    if policy is Policy.recompute and name not in CAN_RECOMPUTE:
        return "cannot be recomputed: what makes it is expensive, or needs communication"
    if policy.compresses and name not in CAN_ROUND:
        return "cannot be rounded: exact numbers or indices are in it"
    return None


@cache
def _getters(section: type, path: str = "") -> tuple[tuple[str, Callable[[Any], object]], ...]:
    """Dotted name of everything in a section and those below it, and what gets its value."""
    found = list[tuple[str, Callable[[Any], object]]]()
    types = get_type_hints(section)
    for each in fields(section):
        name = f"{path}{each.name}"
        if is_dataclass(types[each.name]):
            found += _getters(types[each.name], f"{name}.")
        else:
            found.append((name, attrgetter(name)))
    return tuple(found)

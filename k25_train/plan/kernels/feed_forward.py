"""Kernels after attention in a decoder layer: router, shared and routed experts, permutations; torch-free.

Bytes are what this project's code moves: SwiGLU by torch's operations (`k25_train/model/swiglu.py`), each of
which reads and writes memory; rows gathered and added up in one pass (`k25_train/model/permutation.py`,
Transformer Engine's kernels alike); the router by megatron-core 0.19.2, with Transformer Engine as three
kernels (`moe_router_fusion`).

| width F of a row | forward | backward |
|---|---|---|
| SwiGLU by operations | SiLU 2, times values 3 | two products 3 + 3, SiLU 3, joined 4 |
| and the router's weight | 2 more | times weight 2, times output 3 |
| fused | 3 | 5 |
"""

from collections.abc import Iterator

from k25_train.plan.expert_copies import copies
from k25_train.plan.kernels.attention import norm
from k25_train.plan.kernels.kernel import FLOAT32_BYTES
from k25_train.plan.kernels.work import Setting, Work
from k25_train.plan.projections import feed_forward_projections, moe_projections

SWIGLU_BYTES, SWIGLU_LAUNCHES = (5, 13), (2, 4)
WEIGHTED_SWIGLU_BYTES, WEIGHTED_SWIGLU_LAUNCHES = (7, 18), (4, 7)
FUSED_SWIGLU_BYTES = 3, 5
"""Times that the inner width of a row is moved, forward and backward."""
ROUTER_BYTES, ROUTER_LAUNCHES = (8, 8), (30, 20)
"""Times that float32 scores of all experts are moved, and kernels: sigmoid, bias, top-k, weights, maps, load
and balance loss, one after the other. Counted from megatron-core 0.19.2's `moe_utils.py`; not measured."""
FUSED_ROUTER_BYTES, FUSED_ROUTER_LAUNCHES = (4, 4), (8, 4)
"""The same with Transformer Engine's fused score, choice and loss."""


def before_experts(setting: Setting) -> Iterator[Work]:
    """Of a MoE layer, up to sending tokens: norm, shared expert, router, and rows in the order of experts."""
    model, tokens = setting.config.model, setting.tokens
    yield from norm(setting, "norm before experts", model.hidden_size, made_again="norm.output")
    # 1. The shared expert.
    router, *others = moe_projections(model)
    shared = [each for each in others if each.name.startswith("shared expert")]
    if shared:
        up, down = shared
        yield from setting.projected(up, tokens)
        yield from _swiglu(setting, "shared_expert", tokens, down.inputs)
        yield from setting.projected(down, tokens)
    # 2. The router.
    yield from setting.projected(router, tokens, is_plain=True)
    times, launches = ROUTER_BYTES, ROUTER_LAUNCHES
    if setting.fuses_routing:
        times, launches = FUSED_ROUTER_BYTES, FUSED_ROUTER_LAUNCHES
    scores = tokens * model.num_experts * FLOAT32_BYTES
    yield from setting.moved("router", times[0] * scores, times[1] * scores, launches=launches)
    # 3. Tokens, and gradients of outputs, are rounded once if they are sent in FP8.
    if setting.sends_fp8:
        rounded = tokens * model.hidden_size * (setting.element_bytes + setting.sent_bytes)
        yield from setting.moved("sent in FP8", rounded, rounded)
    # 4. A copy for each expert; other dispatchers read tokens as they are.
    if setting.config.parallelism.dispatcher.sends_once_per_node:
        return
    rows = _row_bytes(setting) * (tokens + tokens * model.num_experts_per_token)
    yield from setting.moved("copies for experts", rows, rows, launches=_permutation_launches(setting))


def experts(setting: Setting) -> Iterator[Work]:
    """Rows sorted by expert, the experts' products, and rows as they came."""
    model, sizes = setting.config.model, setting.sizes
    up, down = moe_projections(model)[-2:]
    rows, groups = sizes.expert_rows, sizes.local_experts
    received = _received_rows(setting)
    # What is sent in FP8 is sorted and read as it comes.
    arrives_in_fp8 = setting.sends_fp8
    sort = _row_bytes(setting) * (received + rows)
    arriving = sort * setting.sent_bytes / setting.element_bytes
    is_sorted, launches = received != rows or groups > 1, _permutation_launches(setting)
    if is_sorted:
        yield from setting.moved("rows by expert", arriving, sort, launches=launches)
    # Fused products round what SwiGLU gives, and its gradient; what comes from outside is cast as ever (TE,
    # `ops/fused/grouped_mlp.py`).
    fuses = setting.casts and setting.assumptions.code.fuses_experts
    is_cast = not arrives_in_fp8
    yield from setting.projected(
        up, rows / groups, groups=groups, casts_input=is_cast, casts_gradient=not fuses
    )
    if not fuses:
        yield from _weighted_swiglu(setting, rows, down.inputs)
    yield from setting.projected(
        down, rows / groups, groups=groups, casts_input=not fuses, casts_gradient=is_cast
    )
    if is_sorted:
        yield from setting.moved("rows as received", sort, arriving, launches=launches)


def after_experts(setting: Setting) -> Iterator[Work]:
    """A token's outputs added up, with the shared expert's and the residual."""
    model, tokens = setting.config.model, setting.tokens
    if not setting.config.parallelism.dispatcher.sends_once_per_node:
        rows = _row_bytes(setting) * (tokens + tokens * model.num_experts_per_token)
        yield from setting.moved("outputs of experts", rows, rows)
    added = 1 + bool(model.num_shared_experts)
    yield from setting.moved("residual", 3 * added * tokens * _row_bytes(setting), 0, launches=(added, 0))


def dense(setting: Setting, layer: int) -> Iterator[Work]:
    """Of a dense layer: norm, SwiGLU, residual."""
    model, tokens = setting.config.model, setting.tokens
    yield from norm(setting, "norm before dense", model.hidden_size, made_again="norm.output")
    up, down = feed_forward_projections(model, layer)
    yield from setting.projected(up, tokens)
    yield from _swiglu(setting, "dense", tokens, down.inputs)
    yield from setting.projected(down, tokens)
    yield from setting.moved("residual", 3 * tokens * _row_bytes(setting), 0, launches=(1, 0))


def _swiglu(setting: Setting, part: str, rows: float, width: int) -> list[Work]:
    times, launches = SWIGLU_BYTES, SWIGLU_LAUNCHES
    if setting.fuses_elementwise:
        times, launches = FUSED_SWIGLU_BYTES, (1, 1)
    each = rows * width * setting.element_bytes
    made_again = f"{part}.down_input"
    return setting.moved(
        f"{part}: SwiGLU", times[0] * each, times[1] * each, launches=launches, made_again=made_again
    )


def _weighted_swiglu(setting: Setting, rows: float, width: int) -> list[Work]:
    times, launches = WEIGHTED_SWIGLU_BYTES, WEIGHTED_SWIGLU_LAUNCHES
    if setting.fuses_swiglu:
        times, launches = FUSED_SWIGLU_BYTES, (1, 1)
    each = rows * width * setting.element_bytes
    return setting.moved(
        "experts: SwiGLU", times[0] * each, times[1] * each, launches=launches, made_again="moe.down_input"
    )


def _received_rows(setting: Setting) -> float:
    """Rows that arrive before they are sorted: of other dispatchers one for several experts of a rank."""
    sizes, config = setting.sizes, setting.config
    if not config.parallelism.dispatcher.sends_once_per_node:
        return sizes.expert_rows
    even = setting.tokens * config.model.num_experts_per_token
    in_turn, of_layout = setting.assumptions.code.routes_in_turn, config.parallelism
    of_each = copies(config, of_layout.ep, of_layout.dispatcher, routes_in_turn=in_turn)
    return sizes.expert_rows * setting.tokens * of_each / even


def _row_bytes(setting: Setting) -> int:
    return setting.config.model.hidden_size * setting.element_bytes


def _permutation_launches(setting: Setting) -> tuple[int, int]:
    """Without Transformer Engine, orders are computed by torch's operations."""
    return (3, 2) if setting.fuses_routing else (12, 4)

"""QK-Clip equals the paper's, one head after another, wherever weights and masters lie."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.buckets import OVERLAP, start_in_buckets
from tests.helpers.large_query_runs import (
    ADAMW,
    CLIP,
    DIMS,
    DIRECT_QUERY,
    MODEL,
    MUONCLIP,
    NUM_LAYERS,
    PROJECTION,
    THRESHOLD,
    enlarge_queries,
    global_names,
)
from tests.helpers.optimizer_on_host import ON_HOST
from tests.helpers.parity import EVERYTHING_OVERLAPS
from tests.helpers.qk_clip_reference import clip_layer, largest_logits
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides
from tests.helpers.tiny_model import build_random_model, documents, modules_of

pytestmark = pytest.mark.distributed

BOOST = 200.0
"""Enlarges the query weights of heads 0 and 2: their logits are far above the threshold, those of 1 below."""


# The formula -----------------------------------------------------------------------------------------------


def differing_shards(_context: RankContext) -> list[tuple[int, int]]:
    from k25_train.optim.qk_clip import scale_rows

    rows, columns = 5, 3
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    scales = torch.rand(rows, generator=torch.Generator().manual_seed(2))
    expected = (matrix * scales[:, None]).flatten()
    wrong = []
    for start in range(rows * columns):
        for stop in range(start + 1, rows * columns + 1):
            shard = matrix.flatten()[start:stop].clone()
            scale_rows(shard, start, scales, columns)
            if not torch.equal(shard, expected[start:stop]):
                wrong.append((start, stop))
    return wrong


def test_a_shard_may_begin_and_end_anywhere() -> None:
    assert run_ranks(differing_shards, 1) == [[]]


def factors(_context: RankContext) -> list[float]:
    from k25_train.optim.qk_clip import clip_factors

    maxima = torch.tensor([-3.0, 0.0, 99.0, 100.0, 200.0, float("inf"), float("nan")])
    return clip_factors(maxima, 100.0).tolist()


def test_only_finite_logits_above_the_threshold_are_clipped() -> None:
    assert run_ranks(factors, 1) == [[1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0]]


class Projected(NamedTuple):
    """Of one layer, [64, H, …]."""

    query: Tensor
    key: Tensor
    value: Tensor


def around_a_clip(context: RankContext) -> list[tuple[Projected, Projected]]:
    """What each layer makes of the same input before and after its weights are scaled."""
    from k25_train.optim.qk_clip import key_value_row_scales, query_row_scales

    dims = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
    found = []
    hidden = torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(1))
    for attention in modules_of(build_random_model(context, **dims), "PackedLatentAttention"):

        def project(attention: Any = attention) -> Projected:
            parts = attention.get_query_key_value_tensors(hidden, packed_seq_params=documents())
            return Projected(*(part.detach() for part in parts[:3]))

        before = project()
        with torch.no_grad():
            query_scales = query_row_scales(FACTORS, DIMS["nope"], DIMS["rope"])
            attention.linear_q_up_proj.weight *= query_scales[:, None]
            key_scales = key_value_row_scales(FACTORS, DIMS["nope"], DIMS["value"])
            attention.linear_kv_up_proj.weight *= key_scales[:, None]
        found.append((before, project()))
    return found


FACTORS = torch.tensor([1.0, 0.3, 1.0, 0.01])


def test_logits_of_clipped_heads_are_scaled_by_gamma_and_nothing_else_changes() -> None:
    for before, after in run_ranks(around_a_clip, 1)[0]:
        logits, clipped = (torch.einsum("ihq,jhq->hij", each.query, each.key) for each in (before, after))
        untouched = FACTORS == 1
        assert torch.equal(clipped[untouched], logits[untouched])
        for found, whole, gamma in zip(clipped, logits, FACTORS.tolist(), strict=True):
            assert (found - gamma * whole).abs().max() <= 1e-6 * gamma * whole.abs().max()
        assert torch.equal(after.value, before.value)
        rotary_key = slice(DIMS["nope"], None)
        assert torch.equal(after.key[..., rotary_key], before.key[..., rotary_key])


def record_and_clip_on_meta(context: RankContext) -> str:
    """All that touches a device's tensors; a meta tensor has no value that the host could read."""
    from k25_train.optim.qk_clip import clip_factors, key_value_row_scales, query_row_scales, scale_rows

    [core, *_] = modules_of(build_random_model(context), "DocumentAttention")
    core.record_max_logits = True
    query, key = torch.empty(2, 64, 4, 16, device="meta")
    for _ in range(2):
        core(query, key, torch.empty(64, 4, 8, device="meta"), documents())
    factors_H = clip_factors(core.max_logits, 100.0)
    for scales in (query_row_scales(factors_H, 10, 6), key_value_row_scales(factors_H, 10, 8)):
        scale_rows(torch.empty(70, device="meta"), 5, scales, 8)
    return str(core.max_logits.device)


def test_recording_and_clipping_never_wait_for_the_device() -> None:
    assert run_ranks(record_and_clip_on_meta, 1) == ["meta"]


# Over ranks ------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """This rank's part of a weight, float32 master, around the clip."""

    start: int
    before: Tensor
    after: Tensor


class Clipped(NamedTuple):
    """What one rank says of one step."""

    logits: dict[int, Tensor]
    """Global layer -> [H] largest logits of this rank's micro-batches, computed apart."""
    shards: dict[str, Shard]
    weights: dict[str, Tensor]
    """The model's attention weights after the step."""
    states_changed: list[str]
    result: Any
    """The step's `ClipResult`."""


def first_after_update(inner: torch.optim.Optimizer, look: Callable[..., None]) -> None:
    """Call `look` after each step of an optimizer, before all that are called already."""
    handle = inner.register_step_post_hook(look)
    inner._optimizer_step_post_hooks.move_to_end(handle.id, last=False)


def record_logits(run: Any, logits: dict[int, Tensor]) -> None:
    """Collect each layer's largest logits, by the reference."""
    from k25_train.model.build import chunk_place

    for vp_stage, chunk in enumerate(run.chunks):
        first = chunk_place(run.config, run.topology, vp_stage).first_layer
        for local, core in enumerate(modules_of(chunk, "DocumentAttention")):

            def look(core: Any, arguments: Any, _output: Any, *, layer: int = first + local) -> None:
                query, key, _, packed = arguments
                found = largest_logits(
                    query.detach(), key.detach(), packed.bounds.lengths, core.softmax_scale
                )
                logits[layer] = torch.maximum(logits.get(layer, found), found)

            core.register_forward_hook(look)


def look_at_pieces(shard: Any, before: dict[str, Tensor], name: str) -> None:
    """Keep updated masters of a shard in host memory, before anything else is done to them."""
    before[name] = torch.full_like(shard.master, torch.nan)

    def keep(values: Tensor, start: int) -> None:
        first = start - shard.start
        before[name][first : first + values.numel()] = values

    shard.transforms.insert(0, keep)


def clip_a_step(context: RankContext, arguments: Sequence[str]) -> Clipped:
    """A step of a run whose heads 0 and 2 have large queries, one parameter a bucket if there are buckets."""
    from k25_train.training.step import train_step
    from parallel.megatron.replicas import complete_parameters

    run = start_in_buckets(context, arguments, bucket_parameters=1)
    enlarge_queries(run, BOOST, range(NUM_LAYERS), (0, 2))
    names = global_names(run)
    before: dict[str, Tensor] = {}
    states: dict[str, tuple[Tensor, Tensor]] = {}

    def look(part: Any, *_: Any) -> None:
        for parameter, shard in part.shards().items():
            before.setdefault(names[parameter], shard.master.detach().clone())
            for key, state in part.optimizer.state[shard.master].items():
                states[f"{names[parameter]}: {key}"] = (state, state.clone())

    logits: dict[int, Tensor] = {}
    record_logits(run, logits)
    for part in run.optimizer.chained_optimizers:
        first_after_update(part.optimizer, partial(look, part))
        # Masters in the host are clipped on their way through the device.
        for parameter, shard in part.shards().items() if ON_HOST in arguments else ():
            name = names[parameter]
            look_at_pieces(part.store.shard(shard.master), before, name)
    with run.data:
        result = train_step(run, 1)
    complete_parameters(run.chunks)
    shards = {}
    for part in run.optimizer.chained_optimizers:
        for parameter, shard in part.shards().items():
            name = names[parameter]
            shards[name] = Shard(shard.start, before[name], shard.master.detach().clone())
    weights = {name: weight.detach().clone() for weight, name in names.items() if PROJECTION.search(name)}
    changed = [name for name, (state, copy) in states.items() if not torch.equal(state, copy)]
    return Clipped(logits, shards, weights, changed, result.clip)


def whole(shards: Sequence[Shard], shape: torch.Size, what: str) -> Tensor:
    """The matrix that shards make up; NaN where none is."""
    flat = torch.full((shape.numel(),), torch.nan)
    for shard in shards:
        part = getattr(shard, what)
        flat[shard.start : shard.start + part.numel()] = part
    return flat.view(shape)


SMOKE = {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}
BFLOAT16 = "train.dtype=bfloat16"
LAYOUTS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "one process": ({}, (MUONCLIP,)),
    "dp2, every matrix cut, on the host": ({"dp": 2}, (*OVERLAP, ADAMW, ON_HOST)),
    "dp4, every matrix cut, bfloat16": ({"dp": 4}, (*OVERLAP, MUONCLIP, BFLOAT16)),
    "pp2 x vpp2": ({"pp": 2, "vpp": 2}, (ADAMW,)),
    "pp2 x vpp2, direct query": ({"pp": 2, "vpp": 2}, (ADAMW, DIRECT_QUERY)),
    "pp2 x vpp2 x ep2, all overlapped, bfloat16": (
        SMOKE,
        (*EVERYTHING_OVERLAPS, MUONCLIP, BFLOAT16),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_clips_as_the_paper_does(name: str, data: Path, tmp_path: Path) -> None:
    sizes, more = LAYOUTS[name]
    # bfloat16 rounds a logit by up to 0.4%.
    rtol = 4e-3 if BFLOAT16 in more else 1e-6
    command = overrides(data, tmp_path, *layout(**sizes), *MODEL, *more, CLIP)
    ranks = run_ranks(clip_a_step, sizes.get("pp", 1) * sizes.get("dp", 1), command, timeout_s=240.0)

    logits: dict[int, Tensor] = {}
    for rank in ranks:
        for layer, found in rank.logits.items():
            logits[layer] = torch.maximum(logits.get(layer, found), found)
        assert rank.states_changed == [], "momentum was touched"
        assert rank.result == ranks[0].result
        for key, shard in rank.shards.items():
            assert PROJECTION.search(key) or torch.equal(shard.before, shard.after), key

    assert sorted(logits) == list(range(NUM_LAYERS))
    assert ranks[0].result.heads_clipped == 2 * NUM_LAYERS
    largest = torch.stack([logits[layer].amax() for layer in range(NUM_LAYERS)]).float()
    torch.testing.assert_close(torch.tensor(ranks[0].result.max_logits), largest, rtol=rtol, atol=0)
    for layer in range(NUM_LAYERS):
        check_layer(layer, logits[layer], ranks, rtol)
    if "every matrix cut" in name:
        assert cut_inside_heads(ranks)


def check_layer(layer: int, logits: Tensor, ranks: list[Clipped], rtol: float) -> None:
    """Masters and weights of one layer against the reference."""
    assert (logits > THRESHOLD).tolist() == [True, False, True]
    stem = f"language_model.decoder.layers.{layer}.self_attention"
    before, after, copies = [], [], []
    is_direct = any(f"{stem}.linear_q_proj.weight" in rank.weights for rank in ranks)
    query = "linear_q_proj" if is_direct else "linear_q_up_proj"
    for name in (f"{stem}.{query}.weight", f"{stem}.linear_kv_up_proj.weight"):
        copies.append([rank.weights[name] for rank in ranks if name in rank.weights])
        shards = [rank.shards[name] for rank in ranks if name in rank.shards]
        for matrices, what in ((before, "before"), (after, "after")):
            matrices.append(whole(shards, copies[-1][0].shape, what))
    clipped = clip_layer(*before, logits.tolist(), THRESHOLD, **DIMS)
    for found, expected, unclipped, weights in zip(after, clipped, before, copies, strict=True):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
        same = expected == unclipped
        assert torch.equal(found[same], expected[same])
        assert not same.all()
        for weight in weights:
            assert torch.equal(weight, found.to(weight.dtype)), "weights are not their masters, rounded"


def cut_inside_heads(ranks: list[Clipped]) -> bool:
    """Whether a shard of every query projection begins inside a head."""
    of_head = (DIMS["nope"] + DIMS["rope"]) * 40
    starts: dict[str, list[int]] = {}
    for rank in ranks:
        for name, shard in rank.shards.items():
            if "linear_q_up_proj" in name:
                starts.setdefault(name, []).append(shard.start)
    return len(starts) == NUM_LAYERS and all(
        any(start % of_head for start in of_one) for of_one in starts.values()
    )

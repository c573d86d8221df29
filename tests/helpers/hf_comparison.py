"""The whole model next to transformers' independent `kimi_k25`: same random weights, float32."""

import math
from typing import Any

import torch

from parallel.config import ContextExchange
from tests.helpers.ranks import RankContext

TOLERANCE = 1e-4
type Batches = dict[str, tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]]
"""Name -> document lengths, and (t, h, w) of the items."""
BATCHES: Batches = {
    "one document of text": ((48,), ()),
    "packed documents": ((20, 1, 33, 10), ()),
    "images of several sizes": ((64, 40), ((1, 4, 6), (1, 2, 2), (1, 10, 4))),
    "video chunk of 2 frames": ((40,), ((2, 4, 4),)),
    "video chunk of 3 frames": ((40,), ((3, 6, 2),)),
    "video chunk of 4 frames": ((40,), ((4, 4, 6),)),
    "images and video together": ((50, 60), ((1, 8, 4), (4, 2, 6), (2, 4, 4), (1, 2, 2))),
}
"""What is compared by default."""


def make_batch(model: Any, lengths: tuple[int, ...], grids: tuple[tuple[int, int, int], ...]) -> tuple:
    """Random tokens with placeholders for the items spread through them, and random pixels."""
    from tests.helpers.hf_reference import media_pad_id

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, model.vocab_size - 8, (sum(lengths),), generator=generator)
    num_features = sum(h * w // 4 for _, h, w in grids)
    places = torch.randperm(sum(lengths), generator=generator)[:num_features].sort().values
    tokens[places] = media_pad_id(model)
    pixels = torch.randn(sum(map(math.prod, grids)), 3 * model.vision.patch_size**2, generator=generator)
    return tokens, places, pixels


def compare(
    context: RankContext, changes: dict[str, Any], batches: Batches = BATCHES
) -> dict[str, dict[str, float]]:
    """Worst logit difference, and share of router choices that agree, for every batch.

    `changes` are of the tiny model's configuration.
    """
    from k25_train.export.released import to_ours
    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.model.weights import load_global_state
    from tests.helpers.hf_reference import build_hf_reference, hf_logits, tiny_model_config
    from tests.helpers.model_chunks import SERIAL, WHOLE_MODEL, build_whole_model, start, train_config

    model = tiny_model_config(**changes)
    topology = start(context, SERIAL, model.num_layers)
    ours = build_whole_model(model, train_config(), topology).eval()
    reference, weights = build_hf_reference(model)
    load_global_state(ours, WHOLE_MODEL, to_ours(weights))
    our_choices, their_choices = watch_routers(ours), watch_hf_routers(reference)
    results = {}
    for name, (lengths, grids) in batches.items():
        tokens, places, pixels = make_batch(model, lengths, grids)
        our_choices.clear()
        their_choices.clear()
        with torch.no_grad():
            documents = PackedDocuments.of(lengths, tokens.device)
            logits = ours(tokens, documents, None, places, pixels if grids else None, grids)
            expected = hf_logits(reference, tokens, lengths, pixels if grids else None, grids)
        results[name] = {
            "difference": (logits - expected).abs().max().item(),
            "scale": expected.abs().max().item(),
            "same_experts": same_choices(our_choices, their_choices),
        }
    return results


def compare_shared(
    context: RankContext, changes: dict[str, Any], batch: str, batches: Batches, kind: ContextExchange
) -> float:
    """Worst logit difference of a batch whose tokens all ranks share, the same on each of them."""
    import torch.distributed as dist

    from k25_train.data.context import held_items
    from k25_train.export.released import to_ours
    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.model.weights import load_global_state
    from parallel.context.exchange import build_exchange
    from parallel.context.plan import plan_context
    from tests.helpers.hf_reference import build_hf_reference, hf_logits, random_checkpoint, tiny_model_config
    from tests.helpers.model_chunks import WHOLE_MODEL, build_whole_model, start, train_config
    from tests.helpers.parallel_sizes import parallel_sizes

    # 1. The model of a rank, its tokens, and the items whose features they take.
    model, cp, (lengths, grids) = tiny_model_config(**changes), context.world_size, batches[batch]
    topology = start(context, parallel_sizes(cp=cp), model.num_layers)
    exchange = build_exchange(kind, topology.groups.cp)
    ours = build_whole_model(model, train_config(), topology, exchange).eval()
    weights = random_checkpoint(model)
    load_global_state(ours, WHOLE_MODEL, to_ours(weights))
    tokens, places, pixels = make_batch(model, lengths, grids)
    documents = PackedDocuments.of_shard(plan_context(lengths, (), cp), topology.cp_rank, tokens.device)
    own = documents.places
    positions, items, rows = held_items(places.numpy(), [h * w // 4 for _, h, w in grids], own.numpy())
    by_item = pixels.split([math.prod(grid) for grid in grids])
    # 2. Its logits, and those of the others.
    with torch.no_grad():
        logits = ours(
            tokens=tokens[own],
            documents=documents,
            media_positions=torch.from_numpy(positions),
            pixels=torch.cat([by_item[item] for item in items]) if len(items) else None,
            grid_thw=[grids[item] for item in items],
            feature_rows=torch.from_numpy(rows),
        )
    shares = [torch.empty_like(logits) for _ in range(cp)]
    dist.all_gather(shares, logits, group=topology.groups.cp)
    # 3. transformers' on the first rank; a rank has as long as others take.
    difference = torch.zeros(())
    if topology.rank == 0:
        reference, _ = build_hf_reference(model, weights)
        with torch.no_grad():
            expected = hf_logits(reference, tokens, lengths, pixels if grids else None, grids)
        plan = plan_context(lengths, (), cp)
        found = torch.empty_like(expected)
        for rank, share in enumerate(shares):
            found[torch.from_numpy(plan.positions(rank))] = share
        difference = (found - expected).abs().max()
    dist.broadcast(difference, 0)
    return difference.item()


def attention_gradients(context: RankContext, changes: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of any element of attention's gradients, by the checkpoint's names."""
    from k25_train.export.released import to_hf, to_ours
    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.model.weights import load_global_state
    from tests.helpers.hf_reference import build_hf_reference, hf_logits, tiny_model_config
    from tests.helpers.model_chunks import SERIAL, WHOLE_MODEL, build_whole_model, start, train_config

    # 1. The same loss of the same packed documents; transformers has no balance loss.
    model, lengths = tiny_model_config(balance_loss_coeff=0.0, **changes), (20, 1, 33, 10)
    ours = build_whole_model(model, train_config(), start(context, SERIAL, model.num_layers))
    reference, weights = build_hf_reference(model)
    load_global_state(ours, WHOLE_MODEL, to_ours(weights))
    tokens, _, _ = make_batch(model, lengths, ())
    targets = tokens.roll(1)
    losses = ours(tokens, PackedDocuments.of(lengths, tokens.device), targets)
    losses.sum().backward()
    logits = hf_logits(reference, tokens, lengths)
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    # 2. transformers has the released names in its attention, so that they can be told apart by the end.
    found = {name: weight.grad for name, weight in ours.named_parameters() if ".self_attention." in name}
    expected = {
        name.removeprefix("model."): weight.grad
        for name, weight in reference.named_parameters()
        if ".self_attn." in name
    }
    differences = {}
    for name, gradient in to_hf(found).items():
        theirs = expected.pop(name.replace("language_model.model.", "language_model."))
        differences[name] = ((gradient - theirs).abs().max() / theirs.abs().max()).item()
    assert not expected, f"no gradients of {expected.keys()}"
    return differences


def watch_routers(model: torch.nn.Module) -> list[torch.Tensor]:
    """Collect the routing map [T, E] of every MoE layer that runs, in order."""
    from megatron.core.transformer.moe.router import TopKRouter

    choices: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda _module, _args, output: choices.append(output[1].bool()))
    return choices


def watch_hf_routers(model: torch.nn.Module) -> list[torch.Tensor]:
    """Collect the expert ids [L, top-k] of every MoE layer and document that runs, in order."""
    choices: list[torch.Tensor] = []
    for module in model.modules():
        if module.__class__.__name__.endswith("TopkRouter"):
            module.register_forward_hook(lambda _module, _args, output: choices.append(output[2]))
    return choices


def same_choices(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Share of tokens and layers whose set of experts is the same."""
    num_layers = len(ours)
    by_layer = [torch.cat(theirs[layer::num_layers]) for layer in range(num_layers)]
    agreed = [
        (torch.zeros_like(chosen).scatter(1, ids, True) == chosen).all(1)
        for chosen, ids in zip(ours, by_layer, strict=True)
    ]
    return torch.cat(agreed).float().mean().item()

"""A toy encoder whose work ranks share, and what one process finds that encodes every item itself."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.dep.cost import EncoderCost
from parallel.dep.grid import Grid
from parallel.dep.plan import VisionItem, VisionPlan
from parallel.dep.transfers import RowRuns
from tests.helpers.held_rows import held_by
from tests.helpers.ranks import RankContext

NUM_RANKS, NUM_REPLICAS, NUM_MICRO_BATCHES = 4, 2, 3
WIDTH, OUT = 12, 8
MOST_ROWS = 512
COST = EncoderCost(per_patch=10, per_pair=1)
SMALL, LARGE, VIDEO = Grid(1, 2, 2), Grid(1, 6, 4), Grid(3, 4, 2)
BATCHES: dict[str, list[VisionItem]] = {
    "text alone": [],
    "one item": [VisionItem(LARGE, 0, 1)],
    "fewer items than ranks": [VisionItem(SMALL, 0, 0), VisionItem(LARGE, 1, 2)],
    "one micro-batch has everything": [VisionItem(grid, 1, 1) for grid in (SMALL, LARGE, VIDEO) * 4],
    "one replica has no image": [VisionItem(grid, 0, n) for n in range(3) for grid in (LARGE, VIDEO)],
    "many": [
        VisionItem(grid, replica, n)
        for replica in range(2)
        for n in range(3)
        for grid in (SMALL, VIDEO, LARGE, SMALL, SMALL)[: 5 - replica - n]
    ],
}


class Toy(torch.nn.Module):
    """An encoder whose items do not mix: two matrices, attention within an item, and the mean over frames of
    each 2 x 2 square."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        self.second = torch.nn.Parameter(torch.randn(OUT, WIDTH, generator=generator) / WIDTH**0.5)

    def forward(self, pixels: Tensor, grid_thw: Sequence[Grid]) -> Tensor:
        hidden = pixels
        for layer in self.layers(pixels, grid_thw):
            hidden = layer(hidden)
        return hidden

    def layers(self, _: Tensor, grid_thw: Sequence[Grid]) -> list[Callable[[Tensor], Tensor]]:
        return [
            lambda pixels: (pixels @ self.first.T).tanh(),
            partial(self._attend, grid_thw=grid_thw),
            partial(self._merge, grid_thw=grid_thw),
        ]

    def _attend(self, hidden: Tensor, grid_thw: Sequence[Grid]) -> Tensor:
        items = hidden.split([t * h * w for t, h, w in grid_thw])
        return torch.cat([torch.softmax(item @ item.T, dim=1) @ item for item in items])

    def _merge(self, hidden: Tensor, grid_thw: Sequence[Grid]) -> Tensor:
        found = []
        for (t, h, w), item in zip(grid_thw, hidden.split([t * h * w for t, h, w in grid_thw]), strict=True):
            merged = item.view(t, h // 2, 2, w // 2, 2, WIDTH).mean(dim=(0, 2, 4)).flatten(0, 1)
            found.append(merged @ self.second.T)
        return torch.cat(found)


def pixels_of(item: int, grid: tuple[int, int, int]) -> Tensor:
    return torch.randn(grid[0] * grid[1] * grid[2], WIDTH, generator=torch.Generator().manual_seed(item))


def loss_of(features: Tensor, replica: int, micro_batch: int, rows: Tensor | None = None) -> Tensor:
    """A loss whose gradient is another one for every row of every micro-batch; `rows` [v]: those given, all
    if None."""
    generator = torch.Generator().manual_seed(100 * replica + micro_batch)
    factors = torch.randn(MOST_ROWS, features.shape[1], generator=generator)
    return (features.tanh() * (factors[: len(features)] if rows is None else factors[rows])).sum()


def alone(items: Sequence[VisionItem]) -> tuple[dict[tuple[int, int], Tensor], list[Tensor]]:
    """Features by replica and micro-batch, and gradients, of one process that has all items."""
    toy, features = Toy(), {}
    for key in sorted({(item.replica, item.micro_batch) for item in items}):
        own = [
            (number, item.grid_thw)
            for number, item in enumerate(items)
            if (item.replica, item.micro_batch) == key
        ]
        pixels = torch.cat([pixels_of(*each) for each in own])
        features[key] = toy(pixels, [grid for _, grid in own])
        loss_of(features[key], *key).backward()
    return {key: value.detach() for key, value in features.items()}, gradients_of(toy)


class Taken(NamedTuple):
    """What a rank of a first stage takes of a micro-batch."""

    rows: Tensor
    """[v], of the micro-batch's features [V, D]."""
    features: Tensor
    """[v, D]."""


Part = tuple[dict[tuple[int, int], Taken], list[Tensor], Any]
"""What a rank's engine gives the first stage, this rank's gradients, and its statistics."""


def start_exchange(context: RankContext, num_first: int) -> Any:
    """Join the test's job, in which the first ranks are in the first stage."""
    from parallel.topology import start_process_group

    os.environ.update(context.environment())
    start_process_group(torch.device("cpu"), 60.0)
    return exchange_in(dist.new_group(), dist.new_group(), num_first)


def exchange_in(features: dist.ProcessGroup, gradients: dist.ProcessGroup, num_first: int) -> Any:
    """A rank's end of the exchange in these groups."""
    from parallel.dep.feature_exchange import FeatureExchange

    return FeatureExchange(
        features,
        gradients,
        range(num_first),
        width=OUT,
        wire_dtype=torch.float32,
        device=torch.device("cpu"),
        phase=lambda *_: nullcontext(),
    )


def engine_setup(exchange: Any, is_trained: bool, device_bytes: int = 1 << 30) -> Any:
    """What either engine needs."""
    from parallel.dep.engine import EngineSetup

    return EngineSetup(
        exchange=exchange,
        device=torch.device("cpu"),
        feature_dtype=torch.float32,
        max_feature_bytes=device_bytes,
        is_trained=is_trained,
        phase=lambda _: nullcontext(),
    )


def chunks_of_rank(rank: int, plan: VisionPlan) -> list[Any]:
    from parallel.dep.vision_pass import Chunk

    chunks = []
    for parts in plan.chunks[rank]:
        own = [plan.parts[part].item for part in parts]
        grids = tuple(plan.items[item].grid_thw for item in own)
        pixels = torch.cat([pixels_of(item, plan.items[item].grid_thw) for item in own])
        chunks.append(Chunk(pixels, grids))
    return chunks


def take(engine: Any, place: tuple[int, int], runs: RowRuns, rank: int) -> tuple[Tensor, Taken] | None:
    """The leaf of a micro-batch in the first stage, and what is in it; None if it has no rows there."""
    leaf = engine.leaf(place[1])
    if leaf is None:
        return None
    rows = held_by(runs(*place), rank, leaf.shape[0])
    return leaf, Taken(rows, leaf.detach().clone())


def gradients_of(toy: Toy) -> list[Tensor]:
    return [torch.zeros_like(each) if each.grad is None else each.grad for each in toy.parameters()]


def put_together(by_rank: Sequence[dict[tuple[int, int], Taken]]) -> dict[tuple[int, int], Tensor]:
    """(replica, micro-batch) -> features [V, D], of which each row has to be on one rank."""
    taken: dict[tuple[int, int], list[Taken]] = {}
    for of_rank in by_rank:
        for place, value in of_rank.items():
            taken.setdefault(place, []).append(value)
    found = {}
    for place, of_place in taken.items():
        rows, order = torch.cat([each.rows for each in of_place]).sort()
        assert rows.tolist() == list(range(len(rows)))
        found[place] = torch.cat([each.features for each in of_place])[order]
    return found


def check_batch(by_rank: Sequence[Part], items: Sequence[VisionItem]) -> None:
    """Features, gradients and statistics of one batch against one process."""
    expected, gradients = alone(items)
    found = put_together([features for features, _, _ in by_rank])
    assert found.keys() == expected.keys()
    for key, features in found.items():
        torch.testing.assert_close(features, expected[key], rtol=1e-6, atol=1e-7)
    for place, gradient in enumerate(gradients):
        summed = sum(of_rank[place] for _, of_rank, _ in by_rank)
        # Numbers of a matrix are sums of terms much larger than themselves.
        atol = max(1e-6, 1e-6 * float(gradient.norm()))
        torch.testing.assert_close(summed, gradient, rtol=1e-5, atol=atol)
    assert sum(stats.num_patches for *_, stats in by_rank) == sum(item.num_patches for item in items)
    # Features and gradients leave their rank once each, unless the owner encoded them.
    sent = sum(stats.sent_bytes for *_, stats in by_rank)
    assert sent <= 2 * sum(item.num_tokens for item in items) * OUT * 4

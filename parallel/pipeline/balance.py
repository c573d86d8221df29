"""Choose the pipeline layout that balances the cost of the chunks. Pure; standard library only.

A pipeline is as fast as its slowest rank, so ranks are balanced first. The embedding costs memory but no
matrix product; the output head costs about as much as two layers of Kimi K2.5.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from parallel.pipeline.layout import LayoutError, PipelineLayout, fitting_sizes, most_chunks

MAX_LEADING_LAYERS = 6
"""Number of leading layers of another kind up to which all their placements, at most 2 to this power, are
tried. DeepSeek V3 has 3, Kimi K2 has 1."""

Objective = tuple[int, int, int, int]
"""(FLOPs of the busiest rank, FLOPs of the busiest chunk, bytes of the fullest rank, sum of the squared FLOPs
of all chunks), compared in this order; smaller is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackCost:
    """Cost of the parts of a decoder stack, in one unit for FLOPs and one for bytes."""

    layer_flops: tuple[int, ...]
    """FLOPs of each layer, in order."""
    layer_bytes: tuple[int, ...]
    """Bytes of each layer on the rank that holds it, in order."""
    embedding_bytes: int
    """Bytes of the input table, in the first chunk."""
    head_flops: int
    """FLOPs of final norm, output head and loss, in the last chunk."""
    head_bytes: int
    """Bytes of final norm and output head."""

    @property
    def num_layers(self) -> int:
        return len(self.layer_flops)


def plan_layout(cost: StackCost, pp: int, vpp: int) -> PipelineLayout:
    """The layout with the smallest objective (see `objective`).

    Layers stay in order, and every chunk gets one, except the first and the last, which may hold only the
    embedding or the loss. The plan is exact if all layers are alike apart from at most `MAX_LEADING_LAYERS`
    at the start, as with dense layers ahead of MoE layers. With more of them, all layers count as alike, at
    their mean cost, and the plan is legal but not always the best.

    For Kimi K2.5's 61 layers over pp=16, vpp=2 it gives `Ett|(tt|)*14t|(tt|)*15L`: 15 ranks with 4 layers,
    and one with 1 layer and the head. The busiest rank has 4.00 layers' FLOPs. NVIDIA's layout for 61 layers,
    `Et|(tt|)*30L`, leaves rank 0 with 3 layers and gives the last one 2 and the head, 4.17 layers' FLOPs at
    4096 tokens (tests/unit/plan/test_costs.py has the figures).

    Raises `LayoutError`, with the sizes that fit, if chunks in the middle would stay empty.
    """
    # 1. Enough layers for the chunks.
    num_layers = cost.num_layers
    if pp * vpp > most_chunks(num_layers):
        divisors = [size for size in range(1, pp + 1) if pp % size == 0]
        pairs = ", ".join(map(str, fitting_sizes(num_layers, divisors, pp, vpp)))
        raise LayoutError(
            f"{num_layers} layers cannot fill pp={pp} x vpp={vpp} = {pp * vpp} chunks, of which only the "
            f"first and the last may be without one: use pp * vpp <= {most_chunks(num_layers)}, "
            f"e.g. (pp, vpp) = {pairs}"
        )

    # 2. The leading layers of another kind, which are placed by trying.
    kinds = list(zip(cost.layer_flops, cost.layer_bytes, strict=True))
    num_leading = next(n for n in range(num_layers + 1) if len(set(kinds[n:])) <= 1)
    if num_leading > MAX_LEADING_LAYERS:
        alike, num_leading = _at_mean_cost(cost), 0
    else:
        alike = cost

    # 3. For each of their placements the best counts of the other layers; the best of these.
    plans = [
        counts
        for leading in _placements(num_leading, pp * vpp)
        if (counts := _fill(alike, leading, pp, vpp)) is not None
    ]
    layouts = [PipelineLayout(pp=pp, vpp=vpp, layers_per_chunk=counts) for counts in plans]
    return min(layouts, key=lambda layout: objective(cost, layout))


def objective(cost: StackCost, layout: PipelineLayout) -> Objective:
    """The figures by which layouts are compared, as `Objective` orders them.

    1. FLOPs of the busiest rank, over its chunks: the time of the steady phase.
    2. FLOPs of the busiest chunk: in the interleaved schedule all ranks wait for it in warm-up and cool-down.
    3. Bytes of the fullest rank.
    4. Evenness of the chunks.
    """
    flops = chunk_loads(cost.layer_flops, layout.layers_per_chunk, 0, cost.head_flops)
    held = chunk_loads(cost.layer_bytes, layout.layers_per_chunk, cost.embedding_bytes, cost.head_bytes)
    rank_flops, rank_bytes = (rank_loads(loads, layout.pp) for loads in (flops, held))
    return max(rank_flops), max(flops), max(rank_bytes), sum(load * load for load in flops)


def chunk_loads(of_layers: tuple[int, ...], counts: tuple[int, ...], first: int, last: int) -> list[int]:
    """Load of each chunk: its layers, and the extra load `first` and `last` of the outermost chunks."""
    loads, start = [], 0
    for count in counts:
        loads.append(sum(of_layers[start : start + count]))
        start += count
    loads[0] += first
    loads[-1] += last
    return loads


def rank_loads(loads: list[int], pp: int) -> list[int]:
    """Load of each pipeline rank, the sum over its chunks."""
    return [sum(loads[rank::pp]) for rank in range(pp)]


def _at_mean_cost(cost: StackCost) -> StackCost:
    num_layers = cost.num_layers
    return StackCost(
        layer_flops=(sum(cost.layer_flops) // num_layers,) * num_layers,
        layer_bytes=(sum(cost.layer_bytes) // num_layers,) * num_layers,
        embedding_bytes=cost.embedding_bytes,
        head_flops=cost.head_flops,
        head_bytes=cost.head_bytes,
    )


def _placements(num_leading: int, num_chunks: int) -> Iterator[tuple[int, ...]]:
    """Every way to put the leading layers into the first chunks, as layers per chunk up to the one with the
    last of them. Only the first chunk may stay empty."""
    yield from _splits(num_leading, num_chunks)
    if num_leading and num_chunks > 1:
        yield from ((0, *split) for split in _splits(num_leading, num_chunks - 1))


def _splits(num_layers: int, num_chunks: int) -> Iterator[tuple[int, ...]]:
    if num_layers == 0:
        yield ()
    elif num_chunks:
        for count in range(1, num_layers + 1):
            yield from ((count, *rest) for rest in _splits(num_layers - count, num_chunks - 1))


def _fill(cost: StackCost, leading: tuple[int, ...], pp: int, vpp: int) -> tuple[int, ...] | None:
    """The best layer counts once the leading layers are placed; None if chunks would stay empty.

    The other layers are alike and go into the chunk of the last leading layer and later ones. That is a
    problem with identical items: each bound of the objective in turn is lowered as far as all layers still
    fit, then layers are added one by one to the least loaded chunk within the bounds, which minimizes the sum
    of squares (a convex sum under nested limits).
    """
    # 1. One layer for each chunk that must not stay empty.
    num_chunks, num_layers = pp * vpp, cost.num_layers
    first_open = max(len(leading) - 1, 0)
    counts = [*leading, *[0] * (num_chunks - len(leading))]
    for chunk in range(max(len(leading), 1), num_chunks - 1):
        counts[chunk] = 1
    rest = num_layers - sum(counts)
    if rest < 0:
        return None

    # 2. Loads so far, and how many more layers fit below given bounds.
    flops = chunk_loads(cost.layer_flops, tuple(counts), 0, cost.head_flops)
    held = rank_loads(chunk_loads(cost.layer_bytes, tuple(counts), cost.embedding_bytes, cost.head_bytes), pp)
    busy = rank_loads(flops, pp)
    layer_flops, layer_bytes = cost.layer_flops[-1], cost.layer_bytes[-1]

    def capacity_of_rank(rank: int, rank_flops: int, rank_bytes: int) -> int:
        return min(
            _capacity(rank_flops - busy[rank], layer_flops), _capacity(rank_bytes - held[rank], layer_bytes)
        )

    def has_capacity(rank_flops: int, chunk_flops: int, rank_bytes: int) -> bool:
        capacity = 0
        for rank in range(pp):
            of_chunks = [
                _capacity(chunk_flops - flops[chunk], layer_flops) for chunk in range(rank, num_chunks, pp)
            ]
            of_rank = capacity_of_rank(rank, rank_flops, rank_bytes)
            if of_rank < 0 or min(of_chunks) < 0:
                return False
            opened = [space for stage, space in enumerate(of_chunks) if stage * pp + rank >= first_open]
            capacity += min(of_rank, sum(opened))
        return capacity >= rest

    # 3. The lowest bounds within which all fit, one after the other.
    no_bound = sum(busy) + rest * layer_flops, sum(held) + rest * layer_bytes
    most_busy = _lowest(busy, layer_flops, rest, lambda bound: has_capacity(bound, *no_bound))
    most_flops = _lowest(flops, layer_flops, rest, lambda bound: has_capacity(most_busy, bound, no_bound[1]))
    most_held = _lowest(held, layer_bytes, rest, lambda bound: has_capacity(most_busy, most_flops, bound))

    # 4. Layer by layer to the least loaded chunk.
    for _ in range(rest):
        fitting = [
            chunk
            for chunk in range(first_open, num_chunks)
            if flops[chunk] + layer_flops <= most_flops
            and capacity_of_rank(chunk % pp, most_busy, most_held) > 0
        ]
        # Of equal chunks the later one: earlier ranks keep the activations of more micro-batches.
        chunk = min(fitting, key=lambda chunk: (flops[chunk], held[chunk % pp], -chunk))
        counts[chunk] += 1
        flops[chunk] += layer_flops
        busy[chunk % pp] += layer_flops
        held[chunk % pp] += layer_bytes
    return tuple(counts)


def _capacity(space: int, of_one: int) -> int:
    """How many more layers fit into a space; negative if it is overfull. A layer without cost always fits."""
    if space < 0:
        return -1
    return space // of_one if of_one else 10**9


def _lowest(loads: list[int], of_one: int, num: int, fits: Callable[[int], bool]) -> int:
    """The lowest bound that fits, among the loads that result from up to `num` more layers."""
    bounds = sorted({load + count * of_one for load in loads for count in range(num + 1)})
    return bounds[bisect_left(bounds, True, key=fits)]

"""The planned layout is the best there is: compared with all others on small stacks, and with NVIDIA's."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parallel.pipeline.balance import MAX_LEADING_LAYERS, StackCost, objective, plan_layout
from parallel.pipeline.layout import LayoutError, PipelineLayout, parse_layout
from tests.helpers.parallel_sizes import even_layout

COSTS = st.integers(0, 9)


@st.composite
def stacks(draw: st.DrawFn, least: int = 0, most: int = 4) -> tuple[StackCost, int, int]:
    """The cost of up to 12 layers, `least` to `most` of them, at the start, each of its own kind, and sizes
    that they fit."""
    pp = draw(st.integers(1, 4))
    vpp = draw(st.integers(1, 3)) if pp > 1 else 1
    num_layers = draw(st.integers(max(1, least, pp * vpp - 2), 12))
    num_leading = draw(st.integers(least, min(most, num_layers)))
    kinds = [(draw(COSTS), draw(COSTS)) for _ in range(num_leading)]
    kinds += [(draw(COSTS), draw(COSTS))] * (num_layers - num_leading)
    cost = StackCost(
        layer_flops=tuple(flops for flops, _ in kinds),
        layer_bytes=tuple(held for _, held in kinds),
        embedding_bytes=draw(st.integers(0, 20)),
        head_flops=draw(st.integers(0, 25)),
        head_bytes=draw(st.integers(0, 20)),
    )
    return cost, pp, vpp


def every_layout(num_layers: int, pp: int, vpp: int) -> Iterator[PipelineLayout]:
    """All layouts in which no chunk but the first and the last is without layers."""
    if pp == 1:
        yield PipelineLayout(pp=1, vpp=1, layers_per_chunk=(num_layers,))
        return
    # With one more layer at each end, no chunk is without: the cuts are all different.
    for cuts in itertools.combinations(range(1, num_layers + 2), pp * vpp - 1):
        first, *middle, last = (end - start for start, end in itertools.pairwise((0, *cuts, num_layers + 2)))
        yield PipelineLayout(pp=pp, vpp=vpp, layers_per_chunk=(first - 1, *middle, last - 1))


@settings(max_examples=300)
@given(stacks())
def test_no_layout_is_better(case: tuple[StackCost, int, int]) -> None:
    cost, pp, vpp = case
    planned = plan_layout(cost, pp, vpp)
    assert all(planned.layers_per_chunk[1:-1])
    best = min(objective(cost, layout) for layout in every_layout(cost.num_layers, pp, vpp))
    assert objective(cost, planned) == best


@settings(max_examples=50)
@given(stacks(least=MAX_LEADING_LAYERS + 2, most=12))
def test_a_stack_with_many_kinds_of_layers_gets_a_legal_layout(case: tuple[StackCost, int, int]) -> None:
    cost, pp, vpp = case
    assume(len(set(zip(cost.layer_flops, cost.layer_bytes, strict=True))) > MAX_LEADING_LAYERS)
    assert plan_layout(cost, pp, vpp) in every_layout(cost.num_layers, pp, vpp)


@given(st.integers(1, 80), st.integers(2, 12), st.integers(1, 4))
def test_layers_that_cost_the_same_are_spread_evenly(num_layers: int, pp: int, vpp: int) -> None:
    assume(pp * vpp <= num_layers)
    counts = even_layout(num_layers, pp, vpp).layers_per_chunk
    assert max(counts) - min(counts) <= 1
    # The earlier a rank, the more micro-batches it keeps activations of: later chunks get what is over.
    assert list(counts[:pp]) == sorted(counts[:pp])


@pytest.mark.parametrize(
    ("head_flops", "pp", "vpp", "expected"),
    [
        (19, 4, 1, "Ett|tt|tt|tL"),
        (21, 4, 1, "Ett|tt|ttt|L"),
        (19, 2, 2, "Ett|tt|tt|tL"),
        (21, 2, 2, "Ett|tt|ttt|L"),
        (71, 2, 1, "Ettttttt|L"),
    ],
)
def test_the_chunk_with_the_head_gets_fewer_layers(head_flops: int, pp: int, vpp: int, expected: str) -> None:
    cost = StackCost(
        layer_flops=(10,) * 7, layer_bytes=(1,) * 7, embedding_bytes=0, head_flops=head_flops, head_bytes=0
    )
    assert plan_layout(cost, pp, vpp).to_megatron() == expected


def test_bytes_decide_between_layouts_of_equal_flops() -> None:
    cost = StackCost(
        layer_flops=(1,) * 5, layer_bytes=(4,) * 5, embedding_bytes=3, head_flops=0, head_bytes=0
    )
    assert plan_layout(cost, 2, 1).to_megatron() == "Ett|tttL"
    assert plan_layout(cost, 2, 1) == even_layout(5, 2)


def test_embedding_and_loss_stand_alone_where_layers_are_few() -> None:
    assert even_layout(2, 2, 2).to_megatron() == "E|t|t|L"
    assert even_layout(61, 21, 3).to_megatron() == "E" + "|t" * 61 + "|L"


@given(st.integers(1, 60), st.integers(2, 40), st.integers(1, 4))
def test_too_few_layers_for_the_chunks_are_refused_with_sizes_that_fit(
    num_layers: int, pp: int, vpp: int
) -> None:
    assume(num_layers + 2 < pp * vpp)
    with pytest.raises(
        LayoutError, match=f"^{num_layers} layers cannot fill pp={pp} x vpp={vpp} = "
    ) as raised:
        even_layout(num_layers, pp, vpp)
    offered = str(raised.value).split("(pp, vpp) = ")[1]
    assert offered
    for pair in offered.replace("), (", ");(").split(";"):
        even_layout(num_layers, *map(int, pair.strip("()").split(", ")))


def test_four_virtual_stages_of_16_ranks_are_one_chunk_too_many_for_61_layers() -> None:
    with pytest.raises(LayoutError, match=r"use pp \* vpp <= 63, e.g. \(pp, vpp\) = \(16, 3\), \(8, 4\)"):
        even_layout(61, 16, 4)


def test_nvidias_layout_is_read() -> None:
    assert parse_layout("Et|(tt|)*30L", 61, 16, 2).layers_per_chunk == (1, *[2] * 30, 0)

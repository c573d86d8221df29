"""The pipeline layout keeps the invariants of its docstring, and says what is wrong with a bad one."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from parallel.layout import LayoutError, PipelineLayout, parse_layout, plan_layout

SIZES = st.integers(1, 12), st.integers(1, 4)


@st.composite
def planned(draw: st.DrawFn) -> tuple[int, PipelineLayout]:
    """A number of layers and its even layout."""
    pp, vpp = draw(SIZES[0]), draw(SIZES[1])
    num_layers = draw(st.integers(pp * vpp, 4 * pp * vpp + 3))
    return num_layers, plan_layout(num_layers, pp, vpp)


@given(planned())
def test_every_layer_appears_once_and_in_order(case: tuple[int, PipelineLayout]) -> None:
    num_layers, layout = case
    pipeline_order = [(stage, rank) for stage in range(layout.vpp) for rank in range(layout.pp)]
    visited = [layer for stage, rank in pipeline_order for layer in layout.layer_ids(rank, stage)]
    assert visited == list(range(num_layers))
    assert layout.num_layers == num_layers
    assert len(layout.layers_per_chunk) == layout.pp * layout.vpp


@given(planned())
def test_the_spread_is_even_and_relieves_the_last_chunk_and_then_the_first(
    case: tuple[int, PipelineLayout],
) -> None:
    counts = case[1].layers_per_chunk
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)
    if counts[0] > min(counts):
        assert all(count == max(counts) for count in counts[1:-1])


@given(planned())
def test_one_chunk_embeds_and_one_computes_the_loss(case: tuple[int, PipelineLayout]) -> None:
    layout = case[1]
    places = [(rank, stage) for rank in range(layout.pp) for stage in range(layout.vpp)]
    assert [place for place in places if layout.is_first(*place)] == [(0, 0)]
    assert [place for place in places if layout.is_last(*place)] == [(layout.pp - 1, layout.vpp - 1)]


@given(planned())
def test_a_layout_survives_being_written_and_read(case: tuple[int, PipelineLayout]) -> None:
    num_layers, layout = case
    assert parse_layout(layout.to_megatron(), num_layers, layout.pp, layout.vpp) == layout


@given(st.integers(1, 60), *SIZES)
def test_too_few_layers_for_the_chunks_are_refused(num_layers: int, pp: int, vpp: int) -> None:
    assume(num_layers < pp * vpp)
    with pytest.raises(LayoutError, match=f"^{num_layers} layers cannot fill pp={pp} x vpp={vpp} = "):
        plan_layout(num_layers, pp, vpp)


def test_the_reports_plan_is_61_layers_over_16_ranks_with_2_virtual_stages() -> None:
    layout = plan_layout(61, pp=16, vpp=2)
    assert layout.layers_per_chunk == (1, *[2] * 29, 1, 1)
    per_rank = [sum(len(layout.layer_ids(rank, stage)) for stage in range(2)) for rank in range(16)]
    assert per_rank == [3, *[4] * 13, 3, 3]


def test_an_explicit_layout_may_leave_chunks_without_layers() -> None:
    layout = parse_layout("Et||t|L", num_layers=2, pp=2, vpp=2)
    assert layout.layers_per_chunk == (1, 0, 1, 0)


def test_an_explicit_layout_may_be_uneven() -> None:
    layout = parse_layout("Et|ttt | t|L", num_layers=5, pp=2, vpp=2)
    assert layout.layers_per_chunk == (1, 3, 1, 0)
    assert layout.layer_ids(pp_rank=1, vp_stage=0) == range(1, 4)
    assert layout.layer_ids(pp_rank=1, vp_stage=1) == range(5, 5)


def test_an_explicit_layout_may_repeat_chunks_and_layers() -> None:
    recipe = parse_layout("Et|(tt|)*30L", num_layers=61, pp=16, vpp=2)
    assert recipe.layers_per_chunk == (1, *[2] * 30, 0)
    assert parse_layout("Et*2|(tt|)*2tL", num_layers=7, pp=2, vpp=2).to_megatron() == "Ett|tt|tt|tL"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Ett|ttL", "it has 2 chunks"),
        ("Ett|tt|tt|ttL", "it has 8 layers"),
        ("tEt|tt|tt|tL", "it reads 'tEttttttL' when joined"),
        ("Ett|tt|tt|Lt", "it reads 'EttttttLt' when joined"),
        ("Ett|tt|tt|tm", "it reads 'Etttttttm' when joined"),
        ("tt|tt|tt|t", "it reads 'ttttttt' when joined"),
        ("|||", "it reads '' when joined"),
        ("E|||L", "it has 0 layers"),
        ("E||||L", "it has 5 chunks"),
    ],
)
def test_an_explicit_layout_that_does_not_add_up_is_refused(text: str, what: str) -> None:
    with pytest.raises(LayoutError) as raised:
        parse_layout(text, num_layers=7, pp=2, vpp=2)
    message = str(raised.value)
    assert message.endswith(what)
    assert repr(text) in message and "pp*vpp = 4 chunks" in message and "'Ett|tt|tt|tL'" in message

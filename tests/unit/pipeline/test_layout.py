"""The pipeline layout keeps the invariants of its docstring, and says what is wrong with a bad one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.layout import LayoutError, PipelineLayout, fitting_sizes, parse_layout


@st.composite
def layouts(draw: st.DrawFn) -> PipelineLayout:
    """Any legal layout, uneven ones and chunks without layers among them."""
    pp, vpp = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, 4), min_size=pp * vpp, max_size=pp * vpp))
    return PipelineLayout(pp=pp, vpp=vpp, layers_per_chunk=tuple(counts))


@given(layouts())
def test_every_layer_appears_once_and_in_order(layout: PipelineLayout) -> None:
    pipeline_order = [(stage, rank) for stage in range(layout.vpp) for rank in range(layout.pp)]
    visited = [layer for stage, rank in pipeline_order for layer in layout.layer_ids(rank, stage)]
    assert visited == list(range(layout.num_layers))


@given(layouts())
def test_one_chunk_embeds_and_one_computes_the_loss(layout: PipelineLayout) -> None:
    places = [(rank, stage) for rank in range(layout.pp) for stage in range(layout.vpp)]
    assert [place for place in places if layout.is_first(*place)] == [(0, 0)]
    assert [place for place in places if layout.is_last(*place)] == [(layout.pp - 1, layout.vpp - 1)]


@given(layouts())
def test_a_layout_survives_being_written_and_read(layout: PipelineLayout) -> None:
    assert parse_layout(layout.to_megatron(), layout.num_layers, layout.pp, layout.vpp) == layout


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


def test_sizes_that_fit_come_with_the_nearest_first() -> None:
    assert fitting_sizes(61, [1, 2, 4, 8, 16, 32], 16, 4) == [
        (16, 3), (8, 4), (16, 2), (8, 5), (8, 3), (8, 6)
    ]  # fmt: skip


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 6))
def test_sizes_that_fit_leave_no_chunk_in_the_middle_without_a_layer(
    num_layers: int, pp: int, vpp: int
) -> None:
    found = fitting_sizes(num_layers, range(1, 80), pp, vpp, limit=10**6)
    assert all(p * v <= num_layers + 2 and (p > 1 or v == 1) for p, v in found)
    assert len(found) == 1 + sum((num_layers + 2) // p for p in range(2, 80))
    assert found[0] == (pp, vpp) or (pp, vpp) not in found

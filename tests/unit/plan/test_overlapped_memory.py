"""What waits on the device while passes overlap, against layers that come and go one by one."""

from itertools import zip_longest

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.memory.activations import peak_of_turns
from k25_train.plan.pipeline import StagePlan, plan_pipeline

LAYER_BYTES = 1000
SHAPE = "experiment=moonlight_16b cluster.nodes=4 parallelism.pp=4 parallelism.vpp=2 activation=keep".split()
EVEN = ("model.num_layers=32", "parallelism.layout=Et*4|(t*4|)*6t*4L")


def stages(*changes: str) -> tuple[StagePlan, ...]:
    return plan_pipeline(compose([*SHAPE, *changes])).stages


def layer_by_layer(stage: StagePlan, each: list[int]) -> float:
    """The most bytes that wait at a time, those of the layer at work included, if each chunk's are spread
    evenly over its layers."""
    held, peak = 0.0, 0.0
    of_layer = [size / max(len(chunk.layers), 1) for size, chunk in zip(each, stage.chunks, strict=True)]
    passes = list(stage.sampled_passes)
    while passes:
        first = passes.pop(0)
        made, freed = [of_layer[first.vp_stage]] * len(stage.chunks[first.vp_stage].layers), list[float]()
        if first.overlaps_next:
            after = passes.pop(0).vp_stage
            freed = [of_layer[after]] * len(stage.chunks[after].layers)
        elif not first.is_forward:
            made, freed = freed, made
        # A layer forward, then one backward, for as long as either pass has any.
        for one, other in zip_longest(made, freed, fillvalue=0.0):
            held += one
            peak = max(peak, held)
            held -= other
    return peak


def of_chunks(stage: StagePlan) -> list[int]:
    return [LAYER_BYTES * len(chunk.layers) for chunk in stage.chunks]


def test_pairs_of_like_chunks_hold_what_their_layers_do() -> None:
    for stage in stages(*EVEN):
        each = of_chunks(stage)
        found = peak_of_turns(stage, each, each, frees_by_layer=True)
        assert found == layer_by_layer(stage, each)
        # Pass by pass, the forward pass of a pair comes before any layer is freed.
        assert found == peak_of_turns(stage, each, each) - 3 * LAYER_BYTES


@pytest.mark.parametrize("layout", ["null", "E|(t*5|)*5tt|L", "Et|(t*8|)*2(ttt|)*2(t|)*2ttL"])
def test_pairs_of_unlike_chunks_hold_no_more_than_planned(layout: str) -> None:
    for stage in stages(f"parallelism.layout={layout}"):
        each = of_chunks(stage)
        found = peak_of_turns(stage, each, each, frees_by_layer=True)
        assert layer_by_layer(stage, each) <= found <= peak_of_turns(stage, each, each)


@pytest.mark.parametrize("each", [[4000, 0], [0, 4000], [4000, 1000]])
def test_pairs_of_chunks_that_hold_unlike_amounts(each: list[int]) -> None:
    for stage in stages(*EVEN):
        found = peak_of_turns(stage, each, each, frees_by_layer=True)
        assert found == layer_by_layer(stage, each)


def test_passes_that_take_turns_hold_whole_ones() -> None:
    alone = ("parallelism.overlap_expert_comm=false", "parallelism.delay_wgrad=false")
    for stage in stages(*alone):
        each = of_chunks(stage)
        found = peak_of_turns(stage, each, each, frees_by_layer=True)
        assert found == peak_of_turns(stage, each, each) == layer_by_layer(stage, each)

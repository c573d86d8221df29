"""What waits on the device while passes overlap, against layers that come and go one by one."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.memory.activations import peak_of_turns
from k25_train.plan.pipeline import StagePlan, plan_pipeline

LAYER_BYTES = 1000
SHAPE = "experiment=moonlight_16b cluster.nodes=4 parallelism.pp=4 parallelism.vpp=2 activation=keep".split()
EVEN = ("model.num_layers=32", "parallelism.layout=Et*4|(t*4|)*6t*4L")


def stages(*changes: str) -> tuple[StagePlan, ...]:
    return plan_pipeline(compose([*SHAPE, *changes])).stages


def layer_by_layer(stage: StagePlan) -> int:
    """The most layers that wait at a time, the one that is at work included."""
    held, peak = 0, 0
    passes = list(stage.sampled_passes)
    while passes:
        first = passes.pop(0)
        forward = len(stage.chunks[first.vp_stage].layers)
        backward = 0
        if first.overlaps_next:
            backward = len(stage.chunks[passes.pop(0).vp_stage].layers)
        elif not first.is_forward:
            forward, backward = 0, forward
        # A layer forward, then one backward, for as long as either pass has any.
        for number in range(max(forward, backward)):
            held += number < forward
            peak = max(peak, held)
            held -= number < backward
    return LAYER_BYTES * peak


def of_chunks(stage: StagePlan) -> list[int]:
    return [LAYER_BYTES * len(chunk.layers) for chunk in stage.chunks]


def test_pairs_of_like_chunks_hold_what_their_layers_do() -> None:
    for stage in stages(*EVEN):
        each = of_chunks(stage)
        found = peak_of_turns(stage, each, each, frees_by_layer=True)
        assert found == layer_by_layer(stage)
        # Pass by pass, the forward pass of a pair comes before any layer is freed.
        assert found == peak_of_turns(stage, each, each) - 3 * LAYER_BYTES


@pytest.mark.parametrize("layout", ["null", "Et*3|(t*4|)*5tt|ttL", "E|(t*5|)*5tt|L"])
def test_pairs_of_unlike_chunks_hold_no_more_than_planned(layout: str) -> None:
    for stage in stages(f"parallelism.layout={layout}"):
        each = of_chunks(stage)
        found = peak_of_turns(stage, each, each, frees_by_layer=True)
        assert layer_by_layer(stage) <= found <= peak_of_turns(stage, each, each)


def test_passes_that_take_turns_hold_whole_ones() -> None:
    alone = ("parallelism.overlap_expert_comm=false", "parallelism.delay_wgrad=false")
    for stage in stages(*alone):
        each = of_chunks(stage)
        found = peak_of_turns(stage, each, each, frees_by_layer=True)
        assert found == peak_of_turns(stage, each, each) == layer_by_layer(stage)

"""What waits on the device while passes overlap, against layers that come and go one by one."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.memory.activations import peak_of_turns, peak_on_device
from k25_train.plan.pipeline import StagePlan, plan_pipeline

LAYER_BYTES = 1000
SHAPE = (
    "experiment=moonlight_16b cluster.nodes=4 parallelism.pp=4 parallelism.vpp=2 activation=keep"
).split()


def stages(*changes: str) -> list[StagePlan]:
    return list(plan_pipeline(compose([*SHAPE, *changes])).stages)


def layer_by_layer(stage: StagePlan) -> int:
    """The most layers that wait at a time, apart from the one that is at work."""
    held, peak = 0, 0
    passes = list(stage.sampled_passes)
    while passes:
        first = passes.pop(0)
        sizes = [len(stage.chunks[first.vp_stage].layers)]
        if first.overlaps_next:
            sizes.append(len(stage.chunks[passes.pop(0).vp_stage].layers))
        elif not first.is_forward:
            sizes.insert(0, 0)
        forward, backward = (*sizes, 0)[:2]
        # A layer forward, then one backward, for as long as either pass has any.
        for number in range(max(forward, backward)):
            held += number < forward
            held -= number < backward
            peak = max(peak, held)
    return LAYER_BYTES * peak


@pytest.mark.parametrize("layout", ["null", "Et*3|(t*4|)*5tt|ttL", "E|(t*5|)*5tt|L"])
def test_pairs_hold_what_their_layers_do(layout: str) -> None:
    for stage in stages(f"parallelism.layout={layout}"):
        of_chunks = [LAYER_BYTES * len(chunk.layers) for chunk in stage.chunks]
        assert peak_on_device(stage, of_chunks, of_chunks) == layer_by_layer(stage), stage.stage
        # Pass by pass, a pair's forward pass comes first.
        assert peak_on_device(stage, of_chunks, of_chunks) <= peak_of_turns(stage, of_chunks, of_chunks)


def test_passes_that_take_turns_hold_whole_ones() -> None:
    alone = ("parallelism.overlap_expert_comm=false", "parallelism.delay_wgrad=false")
    for stage in stages(*alone):
        of_chunks = [LAYER_BYTES * len(chunk.layers) for chunk in stage.chunks]
        found = peak_on_device(stage, of_chunks, of_chunks)
        assert found == peak_of_turns(stage, of_chunks, of_chunks) == layer_by_layer(stage)


def test_what_stays_counts_as_such() -> None:
    """Passes whose activations leave the device hold less; none of them is counted as staying."""
    for stage in stages("activation=k2_fp8_offload"):
        whole, rest = [LAYER_BYTES] * len(stage.chunks), [1] * len(stage.chunks)
        assert peak_on_device(stage, rest, whole) < peak_on_device(stage, whole, whole)
        assert peak_on_device(stage, rest, rest) * LAYER_BYTES == peak_on_device(stage, whole, whole)

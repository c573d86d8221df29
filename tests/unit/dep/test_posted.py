"""Exchanges that a rank has in flight at a time: few, however many ranks and micro-batches there are."""

import random

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.step import StepTimes, step_times
from parallel.dep import program
from parallel.dep.bubbles import Placement, TimedItem, plan_bubbles
from parallel.dep.grid import Grid
from parallel.pipeline.schedule import RECOMPUTE_AND_BACKWARD_COST, schedule_of
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import ChunkSeconds, Timeline
from tests.helpers.posted_exchanges import LAUNCHES, most_in_flight

BOUND = 2 * program.AHEAD
"""Exchanges of a kind: those of `AHEAD` micro-batches, and what passes of unequal length add."""
LAUNCHES_EACH = 3
"""Of an exchange: a wait for the tensors, the kernel, an event."""


def of_job(nodes: int, num_sequences: int) -> StepTimes:
    """The real configuration with a smaller global batch, which is quicker to plan."""
    sizes = [f"cluster.nodes={nodes}", f"train.global_batch_size={num_sequences}", "dep.schedule=bubbles"]
    return step_times(plan_pipeline(compose(["experiment=k25_pretrain_4k", *sizes])))


def planned(times: StepTimes, items_per_sequence: float) -> tuple[list[tuple[int, int]], list[Placement]]:
    """(replica, micro-batch) of images of many sizes, and where they are encoded."""
    generator, places, items = random.Random(7), [], []
    for replica in range(times.config.dp):
        for number in range(times.num_micro_batches):
            while generator.random() < items_per_sequence / (1 + items_per_sequence):
                grid = Grid(1, 2 * generator.randint(4, 40), 2 * generator.randint(4, 40))
                forward_s, copy_s = times.forward_s(grid), times.copy_s(grid)
                backward_s = RECOMPUTE_AND_BACKWARD_COST * forward_s + copy_s
                items.append(TimedItem(replica, number, forward_s + copy_s, backward_s))
                places.append((replica, number))
    found = plan_bubbles(
        times.text,
        items,
        times.config.dp,
        num_steps=times.config.model.vision.num_layers,
        exchange_s=times.exchange_s(3000),
        gather_s=times.gather_s,
        reduce_s=times.reduce_s,
    )
    return places, found.placements


@pytest.mark.parametrize(
    ("nodes", "num_sequences"),
    [
        (32, 2048),
        (512, 8192),
        pytest.param(32, 16384, marks=pytest.mark.slow),
        pytest.param(512, 16384, marks=pytest.mark.slow),
    ],
)
def test_few_exchanges_are_in_flight_at_any_size(nodes: int, num_sequences: int) -> None:
    times = of_job(nodes, num_sequences)
    places, placements = planned(times, items_per_sequence=1.0)
    features, gradients = most_in_flight(places, placements, times.text, times.config.dp)
    assert 0 < features <= BOUND
    assert 0 < gradients <= BOUND
    assert BOUND * LAUNCHES_EACH < LAUNCHES / 10


def test_posted_as_soon_as_encoded_they_would_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = of_job(32, 2048)
    places, placements = planned(times, items_per_sequence=1.0)
    monkeypatch.setattr(program, "AHEAD", 10**6)
    assert most_in_flight(places, placements, times.text, times.config.dp)[0] > BOUND


def small() -> Timeline:
    """Two stages, six micro-batches, of passes of a second each."""
    lists = [schedule_of(2, 1, 6, 6, stage) for stage in range(2)]
    return simulate(lists, ChunkSeconds(forward_s=(1.0, 1.0), backward_s=(1.0, 1.0)))


def test_what_stays_on_its_rank_is_no_exchange() -> None:
    own = Placement(rank=0, forward=((0, 1),), backward=((3, 1),))
    assert most_in_flight([(0, 1)], [own], small(), 1) == (0, 0)


def test_sends_wait_for_the_first_stage_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "AHEAD", 10**6)
    early = Placement(rank=1, forward=((0, 1),), backward=((12, 1),))
    # All are encoded before the second stage's first pass, and posted together.
    found = most_in_flight([(0, number) for number in range(6)], [early] * 6, small(), 1)
    assert found[0] == 6
    monkeypatch.setattr(program, "AHEAD", 1)
    assert most_in_flight([(0, number) for number in range(6)], [early] * 6, small(), 1)[0] < 6

"""Encoding in the pipeline's idle time, over real ranks that run the passes of a schedule at any pace."""

import random
import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from parallel.dep.bubbles import TimedItem, plan_bubbles
from parallel.dep.chunk_memory import ROOM_FOR_ALL, ChunkMemory
from parallel.dep.plan import VisionItem
from parallel.dep.program import chunks_of, program_of
from parallel.dep.transfers import Receiver, transfers_of
from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import Pass, schedule_of
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import ChunkSeconds, Timeline
from tests.helpers.held_rows import made_up_runs
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.toy_encoder import (
    BATCHES,
    COST,
    LARGE,
    SMALL,
    VIDEO,
    Part,
    Toy,
    check_batch,
    chunks_of_rank,
    engine_setup,
    gradients_of,
    loss_of,
    start_exchange,
    take,
)

pytestmark = pytest.mark.distributed

NUM_RANKS = 4
LITTLE_ROOM = ChunkMemory(room_bytes=10.0, kept_bytes=1.0, input_bytes=0.5)


class Case(NamedTuple):
    """A batch in a pipeline."""

    pp: int
    vpp: int
    num_micro_batches: int
    items: list[VisionItem]
    item_s: float
    """Seconds per unit of cost, where a pass takes one second."""
    has_little_room: bool = False
    """Whether chunks of more than 10 patches keep the inputs of layers alone, and one waits at a time."""
    cp: int = 1
    """Ranks of a stage that share the tokens of a micro-batch."""

    @property
    def stage_size(self) -> int:
        return NUM_RANKS // self.pp


def drawn(seed: int, cp: int = 1) -> Case:
    """A pipeline with items that come to a tenth of a step, or to several."""
    generator = random.Random(seed)
    pp = generator.choice((2, 4)) if cp == 1 else 2
    num_micro_batches = pp + generator.randrange(5)
    places = sorted(
        (generator.randrange(NUM_RANKS // pp // cp), generator.randrange(num_micro_batches))
        for _ in range(generator.randrange(40))
    )
    items = [VisionItem(generator.choice((SMALL, LARGE, VIDEO)), *place) for place in places]
    item_s = generator.choice((1e-4, 3e-4, 1e-3))
    return Case(pp, generator.choice((1, 2)), num_micro_batches, items, item_s, bool(seed % 2), cp)


CASES = {name: Case(2, 1, 3, items, 1e-3) for name, items in BATCHES.items()}
# The last stage has encoded its share long before the first one, which waits for it, can take it.
CASES["needed late"] = Case(4, 1, 8, [VisionItem(LARGE, 0, 5)] * 8, 1e-4)
CASES |= {f"drawn {seed}": drawn(seed) for seed in range(16)}
CASES |= {f"on two ranks, drawn {seed}": drawn(seed, cp=2) for seed in range(6)}


def text_of(case: Case) -> Timeline:
    group_size = micro_batch_group_size(case.num_micro_batches, case.pp)
    num_chunks = case.pp * case.vpp
    return simulate(
        [
            schedule_of(case.pp, case.vpp, case.num_micro_batches, group_size, stage)
            for stage in range(case.pp)
        ],
        ChunkSeconds(forward_s=(1.0,) * num_chunks, backward_s=(2.0,) * num_chunks),
    )


def run_cases(context: RankContext, stage_size: int, is_trained: bool) -> dict[str, tuple[Part, int, int]]:
    """Each case with stages of so many ranks: what this rank has, tasks between its passes, all its tasks."""
    exchange = start_exchange(context, stage_size)
    wait_where_ranks_first_meet(dist.new_group())
    pipeline = dist.new_group()
    return {
        name: run_case(exchange, pipeline, case, is_trained)
        for name, case in CASES.items()
        if case.stage_size == stage_size
    }


class Neighbours:
    """The pipeline of a rank as far as its passes wait for those of others."""

    def __init__(self, group: dist.ProcessGroup, case: Case, rank: int) -> None:
        self._group = group
        self._case = case
        self._stage, self._place = divmod(rank, case.stage_size)
        self._sent: list[Any] = []

    def wait_for_input(self, each: Pass) -> None:
        """Wait until the chunk before, or for a backward pass the one after, has run the same micro-batch."""
        chunk = self._chunk(each)
        source = chunk - 1 if each.is_forward else chunk + 1
        if 0 <= source < self._case.pp * self._case.vpp:
            dist.recv(torch.zeros(1), self._rank(source), self._group, tag=self._tag(each, chunk))

    def send_output(self, each: Pass) -> None:
        chunk = self._chunk(each)
        target = chunk + 1 if each.is_forward else chunk - 1
        if 0 <= target < self._case.pp * self._case.vpp:
            tag = self._tag(each, target)
            self._sent.append(dist.isend(torch.zeros(1), self._rank(target), self._group, tag=tag))

    def finish(self) -> None:
        for work in self._sent:
            work.wait()

    def _chunk(self, each: Pass) -> int:
        return each.vp_stage * self._case.pp + self._stage

    def _rank(self, chunk: int) -> int:
        return chunk % self._case.pp * self._case.stage_size + self._place

    def _tag(self, each: Pass, chunk: int) -> int:
        """Of what a chunk receives."""
        return 2 * (chunk * self._case.num_micro_batches + each.micro_batch) + each.is_forward


def wait_where_ranks_first_meet(handshakes: dist.ProcessGroup) -> None:
    """Let posting wait for the other end the first time that two ranks meet in a group, as NCCL does."""
    met: set[tuple[dist.ProcessGroup, int]] = set()
    post = dist.batch_isend_irecv

    def meet_and_post(operations: list[dist.P2POp]) -> list[Any]:
        new = {(operation.group, operation.peer) for operation in operations} - met
        met.update(new)
        works: list[Any] = []
        for group, peer in sorted(new, key=lambda each: (each[0].group_name, each[1])):
            tag = int(group.group_name)
            works.append(dist.isend(torch.zeros(1), peer, handshakes, tag=tag))
            works.append(dist.irecv(torch.zeros(1), peer, handshakes, tag=tag))
        for work in works:
            work.wait()
        return post(operations)

    dist.batch_isend_irecv = meet_and_post


def run_case(
    exchange: Any, pipeline: dist.ProcessGroup, case: Case, is_trained: bool
) -> tuple[Part, int, int]:
    from parallel.dep.bubble_engine import BubbleEngine
    from parallel.dep.engine import VisionWork

    rank, toy, text = exchange.rank, Toy(), text_of(case)
    replica = rank // case.cp if exchange.is_first_stage else None
    timed = [
        TimedItem(
            item.replica,
            item.micro_batch,
            case.item_s * COST.of_item(item.grid_thw),
            3 * case.item_s * COST.of_item(item.grid_thw) * is_trained,
        )
        for item in case.items
    ]
    placements = plan_bubbles(text, timed, case.stage_size, num_steps=3).placements
    if not is_trained:
        placements = [place._replace(backward=()) for place in placements]
    plan, places = chunks_of(case.items, placements, NUM_RANKS, COST, 30)
    memory = LITTLE_ROOM if case.has_little_room else ROOM_FOR_ALL
    program = program_of(rank, plan, places[rank], text, case.stage_size, memory=memory)
    ended: list[int] = []
    # Less than the gradients of one micro-batch: first stages wait for each to leave.
    setup = engine_setup(exchange, is_trained, device_bytes=100 if case.vpp == 1 else 1 << 30)
    engine = BubbleEngine(setup, toy, after_backward=lambda: ended.append(1))
    runs = made_up_runs(case.items, case.cp)
    own = transfers_of(plan, Receiver(rank, replica, case.num_micro_batches, runs))
    engine.start(VisionWork(plan, chunks_of_rank(rank, plan), own, program))
    pace, features, leaves = random.Random(rank), {}, {}
    neighbours = Neighbours(pipeline, case, rank)
    for position, each in enumerate(text.schedules[rank // case.stage_size]):
        engine.before_pass(position)
        neighbours.wait_for_input(each)
        time.sleep(pace.choice((0, 0, 0, 2e-3)))
        if replica is not None and each.vp_stage == 0:
            place = replica, each.micro_batch
            if each.is_forward:
                found = take(engine, place, runs, rank)
                if found is not None:
                    leaves[place], features[place] = found
            elif is_trained and place in leaves:
                loss_of(leaves.pop(place), *place, features[place].rows).backward()
        neighbours.send_output(each)
    engine.finish()
    neighbours.finish()
    assert ended == [1], "the reduction of gradients starts once a step"
    between = sum(len(tasks) for place, tasks in program.tasks.items() if 0 < place < program.num_passes)
    return (features, gradients_of(toy), engine.stats), between, sum(map(len, program.tasks.values()))


@pytest.mark.parametrize("stage_size", [1, 2])
def test_all_ranks_together_are_one_process(stage_size: int) -> None:
    ranks = run_ranks(run_cases, NUM_RANKS, stage_size, True)
    for name in ranks[0]:
        check_batch([rank[name][0] for rank in ranks], CASES[name].items)
    num_between = sum(between for rank in ranks for _, between, _ in rank.values())
    num_tasks = sum(total for rank in ranks for _, _, total in rank.values())
    assert num_between > num_tasks / 8, "hardly anything was encoded between passes"


def test_a_frozen_encoder_sends_no_gradient_and_encodes_once() -> None:
    ranks = run_ranks(run_cases, NUM_RANKS, 2, False)
    for name in ranks[0]:
        parts = [rank[name][0] for rank in ranks]
        keys = {key for features, _, _ in parts for key in features}
        assert keys == {(item.replica, item.micro_batch) for item in CASES[name].items}
        assert all(stats.backward_s == 0 for *_, stats in parts)
        assert not any(gradient.any() for _, gradients, _ in parts for gradient in gradients)
        sent = sum(stats.sent_bytes for *_, stats in parts)
        assert sent <= sum(item.num_tokens for item in CASES[name].items) * 8 * 4

"""Chunks of the tower in the pipeline's idle time stay within the room for them, and compute the same."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from k25_train.compose.resolve import compose
from k25_train.model.moonvit import MoonViT3D
from parallel.dep.chunk_memory import ROOM_FOR_ALL, ChunkMemory, Task, within_room
from parallel.dep.grid import Grid
from parallel.dep.vision_pass import BackwardInSteps, Chunk, LayeredEncoder, recompute_and_backward

NUM_STEPS = 6
GRIDS = (Grid(1, 4, 6), Grid(2, 4, 4), Grid(1, 2, 2))
ROOM = ChunkMemory(room_bytes=100.0, kept_bytes=10.0, input_bytes=1.0)


def tower() -> MoonViT3D:
    torch.manual_seed(3)
    return MoonViT3D(compose(["experiment=smoke"]).model.vision)


def chunk() -> Chunk:
    num_patches = sum(t * h * w for t, h, w in GRIDS)
    return Chunk(torch.randn(num_patches, 588, generator=torch.Generator().manual_seed(5)), GRIDS)


def gradients(run: Callable[[LayeredEncoder, Chunk, Tensor], None]) -> list[Tensor]:
    """The gradients of all parameters after a backward pass in a certain way."""
    encoder, items = tower(), chunk()
    num_tokens = sum(grid.num_tokens for grid in GRIDS)
    shape = (num_tokens, 4, encoder.vision.hidden_size)
    run(encoder, items, torch.randn(shape, generator=torch.Generator().manual_seed(7)))
    return [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("num_steps", [1, 2, 100])
def test_steps_give_bitwise_the_gradients_of_one_pass(keeps: bool, num_steps: int) -> None:
    def in_steps(encoder: LayeredEncoder, items: Chunk, gradient: Tensor) -> None:
        steps = BackwardInSteps(encoder, items, gradient, keeps_activations=keeps)
        num_layers = len(list(encoder.layers(items.pixels, items.grid_thw)))
        for _ in range(-(-num_layers // num_steps) - 1):
            assert not steps.advance(num_steps), "as many steps as layers"
        assert steps.advance(num_steps)

    expected, found = gradients(recompute_and_backward), gradients(in_steps)
    assert len(expected) == len(found) > 10
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_a_chunk_without_room_keeps_one_tensor_of_each_layer() -> None:
    """Between steps; the activations of one layer live within a step."""
    alive = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive
            self.tensor = tensor
            alive += tensor.nbytes

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.nbytes

    def between_steps(keeps: bool) -> list[int]:
        found = []

        def run(encoder: LayeredEncoder, items: Chunk, gradient: Tensor) -> None:
            with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
                steps = BackwardInSteps(encoder, items, gradient, keeps_activations=keeps)
                while not steps.advance(1):
                    found.append(alive)

        gradients(run)
        return found

    assert max(between_steps(keeps=True)) > 0
    assert set(between_steps(keeps=False)) == {0}


def test_what_fits_is_kept() -> None:
    assert ROOM.keeps(10) and not ROOM.keeps(11)
    assert (ROOM.bytes_of(10), ROOM.bytes_of(11)) == (100, 11)
    assert (ROOM.most_joined(8), ROOM.most_joined(1000)) == (8, 10)
    assert ROOM_FOR_ALL.keeps(10**9) and ROOM_FOR_ALL.most_joined(16384) == 16384


def suspended_peak(tasks: dict[int, list[Task]], num_patches: Sequence[int], memory: ChunkMemory) -> float:
    """The most that chunks take at a time which share the room; one that is alone does not count."""
    left: dict[int, int] = {}
    most = 0.0
    for position in sorted(tasks):
        for task in tasks[position]:
            if not task.is_forward:
                left.setdefault(task.chunk, NUM_STEPS)
                running = [chunk for chunk, steps in left.items() if steps]
                if len(running) > 1:
                    most = max(most, sum(memory.bytes_of(num_patches[chunk]) for chunk in running))
                left[task.chunk] -= task.num_steps
    assert not any(left.values()), "every chunk is completed"
    return most


def drawn(seed: int) -> tuple[dict[int, list[Task]], list[int]]:
    """Chunks of any size, their steps anywhere."""
    generator = random.Random(seed)
    num_patches = [generator.randrange(1, 40) for _ in range(generator.randrange(1, 12))]
    tasks: dict[int, list[Task]] = {}
    for chunk in range(len(num_patches)):
        tasks.setdefault(0, []).append(Task(True, chunk, NUM_STEPS))
        steps = NUM_STEPS
        while steps:
            some = generator.randrange(1, steps + 1)
            tasks.setdefault(generator.randrange(1, 30), []).append(Task(False, chunk, some))
            steps -= some
    return tasks, num_patches


@pytest.mark.parametrize("seed", range(30))
def test_suspended_chunks_share_the_room(seed: int) -> None:
    tasks, num_patches = drawn(seed)
    found = within_room(tasks, num_patches, NUM_STEPS, ROOM)
    assert suspended_peak(found, num_patches, ROOM) <= ROOM.room_bytes
    assert found[0] == tasks[0], "forward passes are where they were"
    first = {task.chunk: position for position in sorted(tasks, reverse=True) for task in tasks[position]}
    for position, at_position in found.items():
        assert all(position >= first[task.chunk] for task in at_position), "no chunk starts earlier"


@pytest.mark.parametrize("seed", range(5))
def test_with_room_for_all_nothing_moves(seed: int) -> None:
    tasks: Any = drawn(seed)
    assert within_room(*tasks, NUM_STEPS, ROOM_FOR_ALL) == tasks[0]


def test_without_bounds_chunks_would_take_more() -> None:
    found = [suspended_peak(*drawn(seed), ROOM) for seed in range(30)]
    assert max(found) > 2 * ROOM.room_bytes

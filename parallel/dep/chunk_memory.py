"""How much of the device chunks in their backward pass may take in the pipeline's idle time. Pure; standard
library only.

In bubbles a chunk's recomputation and backward is suspended for the rank's own passes, whose activations are
on the device at the same time. A chunk that is small enough keeps its activations meanwhile. A larger one
keeps the inputs of its layers alone, and runs each layer once more right before it goes backward through it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Task(NamedTuple):
    """Some steps of a pass of the tower over a chunk; the chunk's next task continues where it ends."""

    is_forward: bool
    """Whether it belongs to the forward pass; otherwise to recomputation and backward."""
    chunk: int
    """Index among the rank's chunks."""
    num_steps: int
    """Number of steps, of those that make up either pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMemory:
    """What suspended chunks take, and the room that they share."""

    room_bytes: float
    """What all suspended chunks of a rank may take together; a chunk that takes more is alone."""
    kept_bytes: float
    """Of a patch whose activations are kept in all layers."""
    input_bytes: float
    """Of a patch of which the inputs of layers are kept."""

    def keeps(self, num_patches: int) -> bool:
        """Whether a chunk keeps its activations."""
        return num_patches * self.kept_bytes <= self.room_bytes

    def bytes_of(self, num_patches: int) -> float:
        """What a chunk takes while it is suspended."""
        return num_patches * (self.kept_bytes if self.keeps(num_patches) else self.input_bytes)

    def most_joined(self, max_patches: int) -> int:
        """The most patches, up to `max_patches`, of items that are joined: as many as keep their activations,
        since joining more would only have them computed again."""
        return max_patches if self.keeps(max_patches) else max(int(self.room_bytes // self.kept_bytes), 1)


ROOM_FOR_ALL = ChunkMemory(room_bytes=0.0, kept_bytes=0.0, input_bytes=0.0)
"""Of a device whose memory is not planned."""


def within_room(
    tasks: Mapping[int, Sequence[Task]], num_patches: Sequence[int], num_steps: int, memory: ChunkMemory
) -> dict[int, list[Task]]:
    """[position] -> the tasks of a rank, with those chunks completed early that leave no room for the next.

    A chunk that goes backward has what it needs, so its steps can be done at any time from its first on.

    Args:
        tasks: [position] -> tasks in order.
        num_patches: [chunk] -> its patches.
        num_steps: steps of a pass of any chunk.
        memory: what chunks take.
    """
    left: dict[int, int] = {}
    return {
        position: merged
        for position in sorted(tasks)
        if (merged := list(_at_position(tasks[position], left, num_patches, num_steps, memory)))
    }


def _at_position(
    tasks: Sequence[Task],
    left: dict[int, int],
    num_patches: Sequence[int],
    num_steps: int,
    memory: ChunkMemory,
) -> Iterator[Task]:
    """The tasks at one position; `left` has the remaining steps of all chunks that have gone backward."""
    for task in tasks:
        if task.is_forward:
            yield task
            continue
        # 1. Before a chunk starts, the oldest suspended ones make room for it.
        if task.chunk not in left:
            suspended = [chunk for chunk, steps in left.items() if steps]
            taken = sum(memory.bytes_of(num_patches[chunk]) for chunk in (*suspended, task.chunk))
            while suspended and taken > memory.room_bytes:
                oldest = suspended.pop(0)
                taken -= memory.bytes_of(num_patches[oldest])
                yield Task(False, oldest, left[oldest])
                left[oldest] = 0
            left[task.chunk] = num_steps
        # 2. What is left of it.
        steps = min(task.num_steps, left[task.chunk])
        if steps:
            left[task.chunk] -= steps
            yield task._replace(num_steps=steps)

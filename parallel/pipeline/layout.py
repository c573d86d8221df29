"""Lay a stack of decoder layers out over pipeline stages. Pure; standard library only.

A pipeline of `pp` ranks with `vpp` virtual stages each has `pp * vpp` model chunks, visited in the order
chunk 0 of rank 0, chunk 0 of rank 1, …, chunk 1 of rank 0, … The embedding belongs to the first chunk and the
loss (final norm, output head) to the last. megatron-core writes this as a string with `E`, `t` and `L` and a
`|` between chunks: `Ett|tt|tt|tL` is seven layers over four chunks.

`parallel.pipeline.balance` chooses the layout that balances what the chunks cost.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass


class LayoutError(ValueError):
    """An impossible layout: too few layers for its chunks, or a string that does not add up."""


@dataclass(frozen=True, slots=True)
class PipelineLayout:
    """Which decoder layers each model chunk holds.

    Invariants: chunk counts add up to `num_layers`; every layer appears once, in order; there are exactly
    `pp * vpp` chunks.
    """

    pp: int
    """Pipeline ranks."""
    vpp: int
    """Virtual stages, which are chunks per rank."""
    layers_per_chunk: tuple[int, ...]
    """[chunk, in pipeline order] -> number of its decoder layers; length pp * vpp."""

    @property
    def num_layers(self) -> int:
        return sum(self.layers_per_chunk)

    def chunk_index(self, pp_rank: int, vp_stage: int) -> int:
        """Position of a rank's chunk in pipeline order."""
        return vp_stage * self.pp + pp_rank

    def layer_ids(self, pp_rank: int, vp_stage: int) -> range:
        """Global indices (0-based) of the decoder layers of one chunk."""
        chunk = self.chunk_index(pp_rank, vp_stage)
        first = sum(self.layers_per_chunk[:chunk])
        return range(first, first + self.layers_per_chunk[chunk])

    def is_first(self, pp_rank: int, vp_stage: int) -> bool:
        """Whether the chunk holds the embedding (and, coupled, the vision tower)."""
        return self.chunk_index(pp_rank, vp_stage) == 0

    def is_last(self, pp_rank: int, vp_stage: int) -> bool:
        """Whether the chunk holds the output head and computes the loss."""
        return self.chunk_index(pp_rank, vp_stage) == self.pp * self.vpp - 1

    def to_megatron(self) -> str:
        """The layout in megatron-core's notation, e.g. `Ett|tt|tt|tL`."""
        chunks = ["t" * count for count in self.layers_per_chunk]
        chunks[0] = "E" + chunks[0]
        chunks[-1] = chunks[-1] + "L"
        return "|".join(chunks)


def parse_layout(text: str, num_layers: int, pp: int, vpp: int) -> PipelineLayout:
    """Parse an explicit layout such as `Ett|tt|tt|tL`; a chunk may have no layers, e.g. a last one of `L`.

    Raises `LayoutError` naming what does not add up: the number of chunks, the number of layers, a letter
    other than E, t and L, or E and L out of place.
    """
    chunks = _expand(text.replace(" ", "")).split("|")
    rule = f"parallelism.layout={text!r} must have pp*vpp = {pp * vpp} chunks separated by '|', "
    rule += f"{num_layers} letters 't', one 'E' first and one 'L' last (7 in 4 chunks: 'Ett|tt|tt|tL')"
    body = "".join(chunks)
    if len(chunks) != pp * vpp:
        raise LayoutError(f"{rule}: it has {len(chunks)} chunks")
    if body != "E" + "t" * (len(body) - 2) + "L":
        raise LayoutError(f"{rule}: it reads {body!r} when joined")
    # Chunks and letters are in order; now the number of layers.
    counts = tuple(chunk.count("t") for chunk in chunks)
    if sum(counts) != num_layers:
        raise LayoutError(f"{rule}: it has {sum(counts)} layers")
    return PipelineLayout(pp=pp, vpp=vpp, layers_per_chunk=counts)


def _expand(text: str) -> str:
    """Write repeats out, as megatron-core does: `(tt|)*2t*3` becomes `tt|tt|ttt`."""
    expanded = re.sub(r"\(([^()]*)\)\*(\d+)", lambda match: match[1] * int(match[2]), text)
    return re.sub(r"([A-Za-z])\*(\d+)", lambda match: match[1] * int(match[2]), expanded)


def most_chunks(num_layers: int) -> int:
    """The most chunks that so many layers fill: all but the first (embedding) and last (loss) need one."""
    return num_layers + 2


def fitting_sizes(
    num_layers: int, pp_choices: Iterable[int], pp: int, vpp: int, limit: int = 6
) -> list[tuple[int, int]]:
    """The (pp, vpp) with a legal layout, at most `limit` of them, those nearest to (`pp`, `vpp`) first.

    The distance is the number of doublings and halvings of either size.
    """
    most = most_chunks(num_layers)
    pairs = [(p, v) for p in pp_choices for v in range(1, most // p + 1 if p > 1 else 2) if p * v <= most]
    return sorted(pairs, key=lambda pair: _doublings(pair[0], pp) + _doublings(pair[1], vpp))[:limit]


def _doublings(a: int, b: int) -> float:
    return abs(math.log2(a / b))

"""Lay a stack of decoder layers out over pipeline stages. Pure; standard library only.

A pipeline of `pp` ranks with `vpp` virtual stages each has `pp * vpp` model chunks, visited in the order
chunk 0 of rank 0, chunk 0 of rank 1, …, chunk 1 of rank 0, … The embedding belongs to the first chunk and the
loss (final norm, output head) to the last. megatron-core writes this as a string with `E`, `t` and `L` and a
`|` between chunks: `Ett|tt|tt|tL` is seven layers over four chunks.
"""

import re
from dataclasses import dataclass


class LayoutError(ValueError):
    """A layout that cannot be: too few layers for its chunks, or a string that does not add up."""


@dataclass(frozen=True, slots=True)
class PipelineLayout:
    """Which decoder layers each model chunk holds.

    Invariants: chunk counts add up to `num_layers`; every layer appears once, in order; there are exactly
    `pp * vpp` chunks.
    """

    pp: int
    vpp: int
    layers_per_chunk: tuple[int, ...]
    """Number of decoder layers of each chunk, in pipeline order; length pp * vpp."""

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


def plan_layout(num_layers: int, pp: int, vpp: int) -> PipelineLayout:
    """Spread `num_layers` evenly; the last chunk is the first to get one less, then the first chunk.

    The last chunk also computes the output head and the first one the embedding, so they are the ones to
    relieve. Raises `LayoutError` if a chunk would stay empty.
    """
    num_chunks = pp * vpp
    if num_layers < num_chunks:
        raise LayoutError(
            f"{num_layers} layers cannot fill pp={pp} x vpp={vpp} = {num_chunks} chunks: "
            f"use pp * vpp <= {num_layers}"
        )
    base, extra = divmod(num_layers, num_chunks)
    counts = [base] * num_chunks
    by_spare_work = [*range(1, num_chunks - 1), 0, num_chunks - 1] if num_chunks > 1 else [0]
    for chunk in by_spare_work[:extra]:
        counts[chunk] += 1
    return PipelineLayout(pp=pp, vpp=vpp, layers_per_chunk=tuple(counts))


def parse_layout(text: str, num_layers: int, pp: int, vpp: int) -> PipelineLayout:
    """Read an explicit layout such as `Ett|tt|tt|tL`; a chunk may be without layers, e.g. a last one of `L`.

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
    counts = tuple(chunk.count("t") for chunk in chunks)
    if sum(counts) != num_layers:
        raise LayoutError(f"{rule}: it has {sum(counts)} layers")
    return PipelineLayout(pp=pp, vpp=vpp, layers_per_chunk=counts)


def _expand(text: str) -> str:
    """Write repeats out, as megatron-core does: `(tt|)*2t*3` becomes `tt|tt|ttt`."""
    expanded = re.sub(r"\(([^()]*)\)\*(\d+)", lambda match: match[1] * int(match[2]), text)
    return re.sub(r"([A-Za-z])\*(\d+)", lambda match: match[1] * int(match[2]), expanded)

"""What a global batch amounts to, in a few sums from which everything that is counted per step follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallel.dep.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """Sums over the documents and vision items of a batch; padding counts in none."""

    num_tokens: int
    """Tokens, vision placeholders included."""
    num_token_pairs: int
    """Pairs of a token and one of its document up to itself: what causal attention computes."""
    num_items: int
    """Images and video chunks."""
    num_vision_tokens: int
    """Placeholders, whose embedding comes from the vision tower."""
    num_patches: int
    """Patches that the vision tower reads."""
    num_patch_pairs: int
    """Pairs of patches of one item: what the tower's attention computes."""

    @classmethod
    def of(cls, document_lengths: Iterable[int], grid_thw: Iterable[Grid]) -> BatchSizes:
        """Add up documents, by their lengths in tokens, and items, by their patch grids."""
        lengths = list(document_lengths)
        grids = [(grid.num_patches, grid.num_tokens) for grid in grid_thw]
        return cls(
            num_tokens=sum(lengths),
            num_token_pairs=causal_pairs(lengths),
            num_items=len(grids),
            num_vision_tokens=sum(num_tokens for _, num_tokens in grids),
            num_patches=sum(num_patches for num_patches, _ in grids),
            num_patch_pairs=sum(num_patches**2 for num_patches, _ in grids),
        )


def causal_pairs(document_lengths: Iterable[int]) -> int:
    """Pairs of a token and one of its document up to itself."""
    return sum(length * (length + 1) // 2 for length in document_lengths)

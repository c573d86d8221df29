"""The size of an image or of a chunk of a video, as the vision tower sees it. Standard library only."""

from typing import NamedTuple

MERGE_EDGE = 2
"""Edge, in patches, of the square that becomes one token of the language model. The checkpoint's chat format
counts (h / 2) x (w / 2) placeholders per item, so no other value can be configured."""


class Grid(NamedTuple):
    """Patches of one item; equal to the plain tuple (t, h, w)."""

    t: int
    """Frames; 1 for an image."""
    h: int
    """Rows of patches in a frame, a multiple of `MERGE_EDGE`."""
    w: int
    """Columns of patches in a frame, a multiple of `MERGE_EDGE`."""

    @property
    def num_patches(self) -> int:
        """Patches of all frames, which attend to one another."""
        return self.t * self.h * self.w

    @property
    def num_token_rows(self) -> int:
        """Rows of tokens, the smallest unit that a rank encodes."""
        return self.h // MERGE_EDGE

    @property
    def num_token_columns(self) -> int:
        """Tokens in a row."""
        return self.w // MERGE_EDGE

    @property
    def num_tokens(self) -> int:
        """Tokens of the language model, which are the rows of the item's features.

        Each square of patches becomes one token, and the mean over frames is taken: a chunk of a video has as
        many tokens as one of its frames.
        """
        return self.num_token_rows * self.num_token_columns

"""What a session has to know of a vocabulary."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Vocabulary(Protocol):
    """Ids with a meaning; `prompts.py` has them."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn."""

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Ids that are never drawn."""

    def expanded(self, token_ids: Sequence[int], images: Sequence[bytes]) -> np.ndarray:
        """[P] int32: the ids with every placeholder of the images."""

    def collapsed(self, token_ids: np.ndarray) -> tuple[int, ...]:
        """The ids with one placeholder for each image."""

    def num_media(self, token_ids: np.ndarray) -> int:
        """Images in expanded ids."""

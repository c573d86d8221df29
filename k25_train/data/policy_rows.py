"""What reinforcement learning knows of labels, as columns of micro-batches; nothing in next-token prediction.

Shapes: T tokens of a micro-batch, C columns, L tokens of a piece.
"""

from typing import NamedTuple, Protocol

import numpy as np

from k25_train.data.mix.plan import PlannedPiece

POLICY_COLUMNS = ("rollout_logprobs", "advantages", "policy_weights", "ratio_weights", "ptx_weights")
"""Columns in their order, that of `objectives.base.PolicyTargets`. Each is float32."""
NO_RESPONSE = -1
"""In `PolicyRows.responses`, where a label is of none."""


class PolicyRows(NamedTuple):
    """The columns of a micro-batch. An entry is where the token is that predicts its label."""

    columns: np.ndarray
    """[C, T] float32, in the order of `POLICY_COLUMNS`; [0, 0] without any."""
    responses: np.ndarray
    """[T] int32, number of the trajectory in the step, a response or a branch of one; `NO_RESPONSE`
    elsewhere, [0] without columns."""

    @classmethod
    def of(cls, num_columns: int, num_tokens: int) -> "PolicyRows":
        """Rows in which nothing has a weight."""
        num_tokens = num_tokens if num_columns else 0
        return cls(
            np.zeros((num_columns, num_tokens), dtype=np.float32),
            np.full(num_tokens, NO_RESPONSE, dtype=np.int32),
        )


class PolicySource(Protocol):
    """Knows the columns of planned pieces: `NoPolicy`, or that of a step's trajectories."""

    @property
    def num_columns(self) -> int:
        """C: all of `POLICY_COLUMNS`, or none."""

    def fill(self, rows: PolicyRows, labels: slice, source: str, piece: PlannedPiece) -> None:
        """Write what is known of the labels of a piece, which are its tokens but the first.

        Args:
            rows: of the micro-batch.
            labels: where in it the tokens are that predict them, L - 1.
            source: name of the piece's source.
            piece: L tokens of a document.
        """


class NoPolicy:
    """Next-token prediction: there are no columns."""

    num_columns = 0

    def fill(self, rows: PolicyRows, labels: slice, source: str, piece: PlannedPiece) -> None:
        """See `PolicySource`."""


NO_POLICY = NoPolicy()
"""Has no state."""

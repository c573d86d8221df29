"""The matching of two sets whose scores add up to the most, by shortest augmenting paths.

Source: Kuhn's Hungarian method in the form of Jonker and Volgenant (1987); scipy's `linear_sum_assignment` is
another, which the trainer does not depend on.
"""

import math

import numpy as np

NEGLIGIBLE = 1e-12
"""Score below which a pair counts as none: some hundreds of them change no total by 1e-9."""


def best_total(scores_NM: np.ndarray) -> float:
    """Largest sum of scores over all ways to pair rows with columns, each at most once.

    Args:
        scores_NM: [N, M] float64, 0 or more.
    """
    scores = np.where(scores_NM < NEGLIGIBLE, 0.0, scores_NM)
    scores = scores[scores.any(axis=1)][:, scores.any(axis=0)]
    if scores.shape[0] > scores.shape[1]:
        scores = scores.T
    if not scores.size:
        return 0.0
    columns = _assign(-scores)
    return math.fsum(scores[np.arange(len(columns)), columns].tolist())


def _assign(cost_NM: np.ndarray) -> np.ndarray:
    """[N] column of every row at the least total cost; N is at most M."""
    num_rows, num_columns = cost_NM.shape
    row_price = np.zeros(num_rows + 1)
    # Column 0 stands for the row that is being placed.
    column_price = np.zeros(num_columns + 1)
    row_of = np.full(num_columns + 1, num_rows)
    for row in range(num_rows):
        row_of[0] = row
        column = 0
        least = np.full(num_columns + 1, np.inf)
        before = np.zeros(num_columns + 1, dtype=np.int64)
        visited = np.zeros(num_columns + 1, dtype=bool)
        while row_of[column] != num_rows:
            # 1. Prices of what can be reached from here.
            visited[column] = True
            here = row_of[column]
            reached = cost_NM[here] - row_price[here] - column_price[1:]
            better = np.flatnonzero(~visited[1:] & (reached < least[1:])) + 1
            least[better] = reached[better - 1]
            before[better] = column

            # 2. The nearest one is next.
            nearest = int(np.argmin(np.where(visited, np.inf, least)))
            distance = least[nearest]
            row_price[row_of[visited]] += distance
            column_price[visited] -= distance
            least[~visited] -= distance
            column = nearest
        # 3. Everyone on the path moves on by one.
        while column:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    columns = np.empty(num_rows, dtype=np.int64)
    taken = np.flatnonzero(row_of[1:] < num_rows)
    columns[row_of[1:][taken]] = taken
    return columns

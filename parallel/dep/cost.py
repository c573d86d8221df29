"""What encoding an item costs, by which the plan balances ranks. Pure; standard library only."""

from dataclasses import dataclass

from parallel.dep.grid import MERGE_EDGE, Grid


@dataclass(frozen=True, slots=True)
class EncoderCost:
    """What encoding costs, in whole numbers of any unit; all patches of an item attend to one another."""

    per_patch: int
    """Cost of each patch: embedding, projections, MLPs."""
    per_pair: int
    """Cost of each pair of a query patch and a key patch."""
    per_token: int = 0
    """Cost of each token: the projector."""

    def __post_init__(self) -> None:
        """Raises ValueError if patches are free or anything has a negative cost."""
        if self.per_patch < 1 or self.per_pair < 0 or self.per_token < 0:
            raise ValueError(
                f"{self}: per_patch must be positive and the others not negative; count FLOPs or nanoseconds"
            )

    def of_row(self, grid: Grid) -> int:
        """Cost of one row of tokens of an item, over all frames."""
        patches = MERGE_EDGE * grid.t * grid.w
        return patches * (self.per_patch + self.per_pair * grid.num_patches) + (
            grid.num_token_columns * self.per_token
        )

    def of_item(self, grid: Grid) -> int:
        """Cost of a whole item."""
        return grid.num_token_rows * self.of_row(grid)

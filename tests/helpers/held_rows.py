"""Ranks of a first stage that share the tokens of their micro-batches, in runs that are made up."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.dep.plan import VisionItem
from parallel.dep.transfers import RowRun, RowRuns, of_whole_replica


def made_up_runs(items: Sequence[VisionItem], cp: int, seed: int = 0) -> RowRuns:
    """Runs of one to four rows, or of many, in any order of ranks; now and then a rank holds none."""
    if cp == 1:
        return of_whole_replica

    def runs(replica: int, micro_batch: int) -> Sequence[RowRun]:
        draw = random.Random(f"{seed} {replica} {micro_batch}")
        num_rows = rows_of(items, replica, micro_batch)
        holders = draw.choice([range(cp), range(cp), [draw.randrange(cp)]])
        longest, start, found = draw.choice((4, 4, 40)), 0, list[RowRun]()
        held = dict.fromkeys(range(cp), 0)
        while start < num_rows:
            stop = min(start + draw.randint(1, longest), num_rows)
            cp_rank = draw.choice(holders)
            found.append(RowRun(replica * cp + cp_rank, start, stop, held[cp_rank]))
            held[cp_rank] += stop - start
            start = stop
        return found

    return runs


def rows_of(items: Sequence[VisionItem], replica: int, micro_batch: int) -> int:
    """V of a micro-batch."""
    return sum(i.num_tokens for i in items if (i.replica, i.micro_batch) == (replica, micro_batch))


def held_by(runs: Sequence[RowRun], rank: int, num_held: int) -> Tensor:
    """[v] rows of a micro-batch that a rank holds, of which the number is given."""
    own = [torch.arange(run.start, min(run.stop, run.start + num_held)) for run in runs if run.rank == rank]
    return torch.cat([torch.arange(0), *own])

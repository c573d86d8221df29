"""What every rank of a shrunk run saves and loads, by the dry run. Import it after `use_platform("meta")`."""

from collections.abc import Sequence

from k25_train.checkpoint.files.parts import Part
from k25_train.compose.resolve import compose
from k25_train.dryrun.checkpoint_parts import parts_by_rank
from k25_train.dryrun.rank import build_rank
from k25_train.plan.pipeline import layout_of
from tests.helpers.runs import SHRUNK


def dry_parts(arguments: Sequence[str], *, trains: bool) -> list[list[Part]]:
    """[rank] -> its parts, for these overrides of `SHRUNK`."""
    config = compose([*SHRUNK, "run.dir=unused", *arguments])
    stages = range(config.parallelism.pp)
    ranks = [build_rank(config, layout_of(config), stage * config.dp) for stage in stages]
    return parts_by_rank(ranks, trains=trains)

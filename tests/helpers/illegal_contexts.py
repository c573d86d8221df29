"""Ways to choose ranks that share sequences, which these ranks or sequences cannot have."""

from collections.abc import Callable

from tests.helpers.legal_config import Broken, Legal, Values

CP = "parallelism.cp"


def _alone(legal: Legal, ranks_of_stage: int) -> Values:
    """One node with so many ranks in each stage of a legal configuration, whose experts are not spread."""
    return {
        "cluster.nodes": 1, "cluster.gpus_per_node": legal["parallelism.pp"] * ranks_of_stage,
        "parallelism.ep": 1, "parallelism.overlap_expert_comm": False, "parallelism.delay_wgrad": False,
    }  # fmt: skip


def contexts_beyond_a_stage(legal: Legal) -> Broken:
    of_stage = legal.pick([1, 2, 3, 4])
    cp = legal.pick([size for size in range(2, 9) if of_stage % size])
    return _alone(legal, of_stage) | {CP: cp}, CP, f"must divide the {of_stage} ranks of a stage"


def contexts_that_do_not_divide_tokens(legal: Legal) -> Broken:
    cp, size = legal.pick([3, 5, 7]), legal.pick([1, 2])
    changes = {CP: cp, "train.micro_batch_size": size, "train.seq_len": 256}
    return _alone(legal, cp) | changes, CP, f"must divide the {256 * size} tokens of a micro-batch"


CONTEXT_BREAKS: dict[str, Callable[[Legal], Broken]] = {
    "shared by more ranks than there are": contexts_beyond_a_stage,
    "tokens that are not shared evenly": contexts_that_do_not_divide_tokens,
}

"""What ranks that share sequences (context parallelism) need of the other sizes."""

from k25_train.config.basics import ranks_of_stage
from k25_train.config.cluster import ClusterConfig
from k25_train.config.training import TrainConfig
from parallel.config import ParallelismConfig, Problem


def contexts_divide_stages(cluster: ClusterConfig, parallelism: ParallelismConfig) -> list[Problem]:
    """The ranks of a stage form whole groups that share sequences."""
    of_stage = ranks_of_stage(cluster.world_size, parallelism.pp)
    if cluster.world_size % parallelism.pp or of_stage % parallelism.cp == 0:
        return []
    rule = f"must divide the {of_stage} ranks of a stage ({cluster.world_size} / pp {parallelism.pp})"
    sizes = ", ".join(str(size) for size in range(1, of_stage + 1) if of_stage % size == 0)
    remedy = f"use one of {sizes}, or change pp or the number of ranks"
    return [Problem("parallelism.cp", parallelism.cp, rule, remedy)]


def contexts_divide_tokens(train: TrainConfig, parallelism: ParallelismConfig) -> list[Problem]:
    """Each rank that shares a micro-batch holds as many of its tokens as the others."""
    tokens = train.micro_batch_size * train.seq_len
    if tokens % parallelism.cp == 0:
        return []
    rule = (
        f"must divide the {tokens} tokens of a micro-batch (micro_batch_size {train.micro_batch_size} x "
        f"seq_len {train.seq_len})"
    )
    remedy = f"use a divisor of these, or a train.seq_len that is a multiple of {parallelism.cp}"
    return [Problem("parallelism.cp", parallelism.cp, rule, remedy)]


RULES = (contexts_divide_stages, contexts_divide_tokens)

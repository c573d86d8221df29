"""Which passes each pipeline rank runs, and in which order; torch-free."""

from k25_train.config.schema import Config
from parallel.dep.timeline import Pass, schedule_of
from parallel.micro_batches import micro_batch_group_size


def passes_by_stage(config: Config, num_micro_batches: int | None = None) -> list[list[Pass]]:
    """[stage] -> its passes, with the micro-batches of the global batch unless told."""
    number, sizes = num_micro_batches or config.num_micro_batches, config.parallelism
    group_size = micro_batch_group_size(number, sizes.pp) if sizes.vpp > 1 else number
    return [
        schedule_of(sizes.pp, sizes.vpp, number, group_size, stage, overlaps=sizes.overlap_expert_comm)
        for stage in range(sizes.pp)
    ]

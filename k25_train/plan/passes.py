"""Which passes each pipeline rank runs, and in which order; torch-free."""

from k25_train.config.schema import Config
from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import Pass, schedule_of


def passes_by_stage(config: Config, num_micro_batches: int | None = None) -> list[list[Pass]]:
    """[stage] -> its passes, with the micro-batches of the global batch unless told."""
    return [passes_of_stage(config, stage, num_micro_batches) for stage in range(config.parallelism.pp)]


def passes_of_stage(config: Config, stage: int, num_micro_batches: int | None = None) -> list[Pass]:
    """The passes of one stage, with the micro-batches of the global batch unless told."""
    number = num_micro_batches or config.num_micro_batches
    return _passes(config, stage, number, _group_size(config, number))


def sample_of_passes(config: Config, stage: int) -> list[Pass]:
    """Passes of one stage for a few of a step's micro-batches: what is held at a time in the step is held in
    these. A warm-up is followed by one group after another through all virtual stages, each like the one
    before it but the last, which may be smaller or larger."""
    number, pp = config.num_micro_batches, config.parallelism.pp
    if config.parallelism.vpp == 1:
        return _passes(config, stage, min(number, 4 * pp + 4), group_size=1)
    group_size = _group_size(config, number)
    return _passes(config, stage, min(number, 4 * group_size + number % group_size), group_size)


def _passes(config: Config, stage: int, number: int, group_size: int) -> list[Pass]:
    sizes = config.parallelism
    return schedule_of(sizes.pp, sizes.vpp, number, group_size, stage, overlaps=sizes.overlap_expert_comm)


def _group_size(config: Config, number: int) -> int:
    return micro_batch_group_size(number, config.parallelism.pp) if config.parallelism.vpp > 1 else number

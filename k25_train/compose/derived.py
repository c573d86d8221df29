"""Sizes and the layout that follow from the configuration, printed and saved along with it."""

from k25_train.config.schema import Config
from k25_train.parameters.released import count_parameters
from k25_train.plan.pipeline import layout_of


def derived_sizes(config: Config) -> dict[str, int | str]:
    """Name -> value of every size that the configuration implies, and the pipeline layout."""
    tokens_per_step = config.train.global_batch_size * config.train.seq_len
    counts = count_parameters(config.model)
    return {
        "world_size": config.world_size,
        "dp": config.dp,
        "dp_cp": config.dp_cp,
        "expert_dp": config.expert_dp,
        "layout": layout_of(config).to_megatron(),
        "num_micro_batches": config.num_micro_batches,
        "tokens_per_step": tokens_per_step,
        "tokens_total": config.train.batches.tokens_after(config.train.steps),
        "parameters_total": counts.total,
        "parameters_active": counts.active,
    }

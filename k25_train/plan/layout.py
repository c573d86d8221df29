"""The pipeline layout of a configuration; torch-free."""

from k25_train.config.schema import Config
from k25_train.plan.layer_costs import stack_cost
from parallel.pipeline.balance import plan_layout
from parallel.pipeline.layout import PipelineLayout, parse_layout


def layout_of(config: Config) -> PipelineLayout:
    """The configured layout, or the one that balances the chunks' cost (`parallel.pipeline.balance`)."""
    sizes, num_layers = config.parallelism, config.model.num_layers
    if sizes.layout is not None:
        return parse_layout(sizes.layout, num_layers, sizes.pp, sizes.vpp)
    cost = stack_cost(config.model, config.train, config.optim, config.cluster, sizes)
    return plan_layout(cost, sizes.pp, sizes.vpp)

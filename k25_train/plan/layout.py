"""The pipeline layout of a configuration; torch-free."""

from k25_train.config.schema import Config
from k25_train.plan.costs import stack_cost
from parallel.layout import PipelineLayout, parse_layout
from parallel.layout_plan import plan_layout


def layout_of(config: Config) -> PipelineLayout:
    """The configured layout, or the one that balances what the chunks cost (see `parallel.layout_plan`)."""
    sizes, num_layers = config.parallelism, config.model.num_layers
    if sizes.layout is not None:
        return parse_layout(sizes.layout, num_layers, sizes.pp, sizes.vpp)
    cost = stack_cost(config.model, config.train, config.optim, config.cluster, sizes)
    return plan_layout(cost, sizes.pp, sizes.vpp)

"""The activation policies of one rank, put together: names from the configuration, budgets from the plan."""

from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.model.multimodal import MultimodalModel
from k25_train.plan.memory.activations import offload_budget
from k25_train.plan.passes import passes_of_stage
from parallel.activations.copier import HostMemoryError
from parallel.activations.manager import ActivationManager, build_engine
from parallel.activations.order import offload_order
from parallel.topology import Topology


def build_activations(
    config: Config, chunks: list[MultimodalModel], topology: Topology
) -> ActivationManager | None:
    """What saves this rank's activations by policy; None if all are kept, and so nothing is to be done.

    Raises `ConfigError` if the host does not have the memory to offload to.
    """
    activation, stage = config.activation, topology.pp_rank
    if activation.keeps_all:
        return None
    engine = None
    if activation.offloads:
        budget = offload_budget(config, stage)
        try:
            engine = build_engine(topology.device, budget.host_bytes, budget.device_bytes)
        except HostMemoryError as error:
            raise ConfigError(str(error)) from error
    order = offload_order(passes_of_stage(config, stage), activation.passes_ahead)
    return ActivationManager(activation.policies(), chunks, order, engine)

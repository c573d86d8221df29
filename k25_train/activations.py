"""The activation policies of one rank, put together: names from the configuration, budgets from the plan."""

from k25_train.config.schema import Config
from k25_train.model.multimodal import MultimodalModel
from k25_train.plan.activations import offload_budget
from k25_train.plan.schedule import passes_by_stage
from parallel.activations.order import offload_order
from parallel.activations.store import ActivationStore, build_engine
from parallel.topology import Topology

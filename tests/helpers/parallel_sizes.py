"""Parallel sizes and layouts of tests; imports neither torch nor megatron-core."""

from typing import Any

from parallel.config import ParallelismConfig
from parallel.dispatcher import Dispatcher
from parallel.pipeline.balance import StackCost, plan_layout
from parallel.pipeline.layout import PipelineLayout


def parallel_sizes(**overrides: Any) -> ParallelismConfig:
    """Nothing is cut and nothing overlaps, but for the overrides."""
    values: dict[str, Any] = {
        "pp": 1, "vpp": 1, "ep": 1, "cp": 1, "cp_exchange": None, "layout": None,
        "dispatcher": Dispatcher.alltoall, "dispatcher_sms": None, "dispatcher_capacity": None,
        "overlap_expert_comm": False, "delay_wgrad": False, "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    }  # fmt: skip
    return ParallelismConfig(**values | overrides)


def even_cost(num_layers: int) -> StackCost:
    """Layers that cost the same each, and nothing else costs anything."""
    return StackCost(
        layer_flops=(1,) * num_layers,
        layer_bytes=(1,) * num_layers,
        embedding_bytes=0,
        head_flops=0,
        head_bytes=0,
    )


def even_layout(num_layers: int, pp: int = 1, vpp: int = 1) -> PipelineLayout:
    """Layers spread evenly."""
    return plan_layout(even_cost(num_layers), pp, vpp)

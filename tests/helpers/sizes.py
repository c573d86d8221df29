"""Parallel sizes of tests; imports neither torch nor megatron-core."""

from typing import Any

from parallel.config import ParallelismConfig


def parallel_sizes(**overrides: Any) -> ParallelismConfig:
    """Nothing is cut and nothing overlaps, but for the overrides."""
    values: dict[str, Any] = {
        "pp": 1, "vpp": 1, "ep": 1, "layout": None, "overlap_expert_comm": False, "delay_wgrad": False,
        "overlap_grad_reduce": False, "overlap_param_gather": False,
    }  # fmt: skip
    return ParallelismConfig(**values | overrides)

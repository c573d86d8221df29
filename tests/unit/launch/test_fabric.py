"""Variables of the ranks follow from the cluster's file alone."""

import pytest
import torch

from k25_train.compose.resolve import compose
from k25_train.joining.variables import is_compared
from launch.fabric import environment
from parallel.config import CUDA_ALLOCATOR
from parallel.megatron import platform
from tests.helpers.project_sources import REPO

ROCE = ["experiment=k25_pretrain_4k"]


def variables(*overrides: str) -> dict[str, str]:
    """Name -> value of what these overrides lead to."""
    return {variable.name: variable.value for variable in environment(compose(overrides))}


def test_roce() -> None:
    assert variables(*ROCE) == {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "K25_NUMA_BINDING": "gpu",
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "1200",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": "runs/k25_pretrain_4k/nccl_trace_rank_",
        "NCCL_SOCKET_IFNAME": "=bond0",
        "GLOO_SOCKET_IFNAME": "bond0",
        "NCCL_IB_HCA": "=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7",
        "NCCL_IB_TC": "106",
        "NCCL_IB_TIMEOUT": "22",
        "NCCL_IB_RETRY_CNT": "7",
        "NCCL_IB_ROCE_VERSION_NUM": "2",
        "NCCL_IB_ADDR_FAMILY": "AF_INET",
    }


def test_a_row_of_the_gid_table_takes_the_place_of_the_search() -> None:
    found = variables(*ROCE, "cluster.fabric.gid_index=3")
    assert found["NCCL_IB_GID_INDEX"] == "3"
    assert "NCCL_IB_ROCE_VERSION_NUM" not in found


@pytest.mark.parametrize("cluster", ["local", "local_slurm"])
def test_cpu_ranks_get_nothing_of_nccl_or_cuda(cluster: str) -> None:
    assert set(variables("experiment=smoke", f"cluster={cluster}")) == {"OMP_NUM_THREADS", "PYTHONUNBUFFERED"}


def test_torch_s_watchdog_waits_for_the_stall_watchdog() -> None:
    found = variables(*ROCE, "train.stall_timeout_s=900.5")
    assert int(found["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) == 1501
    config = compose([*ROCE, "train.stall_timeout_s=900.5"])
    assert config.train.collective_timeout_s > config.train.stall_timeout_s


def test_what_determinism_needs_is_there_before_libraries_start() -> None:
    found = variables(*ROCE, "train.deterministic=true")
    added = {name: value for name, value in found.items() if name not in variables(*ROCE)}
    assert added == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
    }
    # Ranks that have them otherwise are told before the first step.
    assert all(is_compared(name) for name in added)
    assert "NCCL_ALGO" not in variables("experiment=smoke", "train.deterministic=true")


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_cuda_queues_in_either_overlap_mode(overlap: str) -> None:
    keys = [f"parallelism.{name}={overlap}" for name in ("overlap_expert_comm", "delay_wgrad")]
    assert variables(*ROCE, *keys)["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


def test_the_number_of_cuda_queues_is_defined_once() -> None:
    source = (REPO / "parallel/megatron/platform.py").read_text()
    assert "str(CUDA_QUEUES)" in source and platform.CUDA_QUEUES == 32


def test_a_site_can_choose_another_allocator() -> None:
    own = "cluster.overrides.PYTORCH_CUDA_ALLOC_CONF={value: max_split_size_mb:512, reason: tried here}"
    assert variables(*ROCE)["PYTORCH_CUDA_ALLOC_CONF"] == CUDA_ALLOCATOR
    assert variables(*ROCE, own)["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512"


def test_torch_knows_the_allocator_that_is_asked_for() -> None:
    torch._C._accelerator_setAllocatorSettings(CUDA_ALLOCATOR)
    assert torch._C._accelerator_getAllocatorSettings() == CUDA_ALLOCATOR


def test_every_variable_has_a_reason() -> None:
    for variable in environment(compose(ROCE)):
        assert len(variable.reason) > 20 and "\n" not in variable.reason

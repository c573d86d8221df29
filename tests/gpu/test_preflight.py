"""Preflight on a real GPU: its tools print what is parsed, and rates are measured."""

import pytest

from launch.preflight.affinity import read_paths
from launch.preflight.findings import Verdict
from launch.preflight.gpu_load import LOAD_CHECKS, GpuLoad, judge_load, read_load
from launch.preflight.gpu_state import read_states
from launch.preflight.gpus import judge_gpus, read_gpus
from launch.preflight.measure import measure_gemm, measure_host_copy, prepare_device
from launch.preflight.system import System

pytestmark = pytest.mark.gpu


def test_gpus_are_read_from_the_real_tool() -> None:
    gpus = read_gpus(System())
    assert gpus[0].memory_mib
    count, *_ = judge_gpus(gpus, len(gpus))
    assert count.verdict is Verdict.passed


def test_states_are_read_from_the_real_tool() -> None:
    states, gpus = read_states(System()), read_gpus(System())
    assert [state.bus_id for state in states] == [gpu.bus_id for gpu in gpus]
    assert all(state.memory_used_mib is not None and state.compute_mode for state in states)


def test_paths_are_read_from_the_real_tool() -> None:
    paths = read_paths(System())
    assert sorted(paths.to_cards) == [gpu.index for gpu in read_gpus(System())]


def test_rates_are_measured_while_clocks_are_looked_at() -> None:
    device = prepare_device("cuda", 0)
    load: list[GpuLoad] = []
    assert measure_gemm(device, lambda: load.extend(read_load(System()))) > 1.0
    assert tuple(finding.check for finding in judge_load(load)) == LOAD_CHECKS
    assert measure_host_copy(device) > 0.1

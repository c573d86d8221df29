"""Preflight on a real GPU: its tools print what is parsed, and rates are measured."""

import pytest

from launch.preflight.affinity import read_paths
from launch.preflight.findings import Verdict
from launch.preflight.gpus import judge_gpus, judge_slowdowns, read_gpus, read_slowdowns
from launch.preflight.measure import measure_gemm, measure_host_copy, prepare_device
from launch.preflight.system import System

pytestmark = pytest.mark.gpu


def test_gpus_are_read_from_the_real_tool() -> None:
    gpus = read_gpus(System())
    assert gpus[0].memory_mib
    count, *_ = judge_gpus(gpus, len(gpus))
    assert count.verdict is Verdict.passed


def test_paths_are_read_from_the_real_tool() -> None:
    paths = read_paths(System())
    assert sorted(paths.to_cards) == [gpu.index for gpu in read_gpus(System())]


def test_rates_are_measured_while_clocks_are_looked_at() -> None:
    device = prepare_device("cuda", 0)
    slowdowns: dict[int, int] = {}
    assert measure_gemm(device, lambda: slowdowns.update(read_slowdowns(System()))) > 1.0
    assert judge_slowdowns(slowdowns).check == "GPU throttling"
    assert measure_host_copy(device) > 0.1

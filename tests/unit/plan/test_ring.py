"""What rings over ranks take, counted by hand."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.parameters.megatron import vision_parameters
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.data_parallel import chunk_exchange
from k25_train.plan.time.ring import ring
from k25_train.plan.time.step import vision_times
from tests.helpers.trained import trained_vision


def test_a_ring_leaves_neighbours_once_per_card() -> None:
    """8 GB over 256 ranks, 8 of them neighbours: each card carries an eighth of 255/256."""
    config = compose(["experiment=k25_pretrain_4k"])
    network_s, nvlink_s = ring(config, 8e9, 256, 8)
    assert network_s == pytest.approx(8e9 * 255 / 256 / 8 / (0.85 * 50e9))
    assert nvlink_s == pytest.approx(8e9 * 255 / 256 / 150e9)
    # Neighbours alone send nothing over the network, strangers nothing over NVLink, one rank nothing.
    assert ring(config, 8e9, 8, 8).network_s == 0
    assert ring(config, 8e9, 4, 1) == (pytest.approx(8e9 * 3 / 4 / (0.85 * 50e9)), 0)
    assert ring(config, 8e9, 1, 1).seconds == 0


def test_the_towers_weights_are_those_of_all_ranks() -> None:
    config = compose(["experiment=k25_pretrain_4k"])
    times = vision_times(config)
    assert times.gather_s == pytest.approx(470e6 * 2 * 255 / 256 / 150e9, rel=0.05)
    assert times.reduce_s == pytest.approx(2 * times.gather_s)
    frozen = compose(["experiment=k25_pretrain_4k", *trained_vision("nothing")])
    assert (vision_times(frozen).gather_s, vision_times(frozen).reduce_s) == (0, 0)


def test_a_slow_network_is_what_the_towers_weights_wait_for() -> None:
    config = compose(["experiment=k25_pretrain_4k", "cluster.network_gb_per_s=1"])
    weights = sum(each.size for each in vision_parameters(config.model))
    assert vision_times(config).gather_s == pytest.approx(2 * weights * 255 / 256 / 8 / 0.85e9, rel=1e-3)


def test_between_processes_of_the_cpu_the_configured_rate_counts() -> None:
    config = compose(["experiment=smoke", "cluster.network_gb_per_s=1"])
    weights = sum(each.size for each in vision_parameters(config.model))
    assert vision_times(config).reduce_s == pytest.approx(4 * weights * 3 / 4 / 1e9)


def test_dense_weights_and_experts_follow_each_other() -> None:
    pipeline = plan_pipeline(compose(["experiment=k25_pretrain_4k"]))
    of_chunk = chunk_exchange(pipeline, 5, 4)
    assert of_chunk.seconds <= of_chunk.network_s + of_chunk.nvlink_s
    assert of_chunk.seconds >= max(of_chunk.network_s, of_chunk.nvlink_s)

"""Pushes of weights: bytes are those that an export writes, seconds those that others have published."""

import json

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.rollout import EngineWeights
from k25_train.export.listing import WeightFormat, released_tensors
from k25_train.plan.__main__ import main
from k25_train.plan.weight_push import PUBLISHED, broadcast_s, plan_pushes, pushed_bytes
from tests.helpers.in_process import status_of_command

JOB = ["experiment=k25_pretrain_4k", "cluster.nodes=32"]


@pytest.mark.parametrize(
    ("weights", "stored"),
    [(EngineWeights.int4, WeightFormat.int4), (EngineWeights.bf16, WeightFormat.bf16)],
)
def test_bytes_are_those_of_an_export(weights: EngineWeights, stored: WeightFormat) -> None:
    model = compose(["experiment=smoke"]).model
    exported = [entry for tensor in released_tensors(model) for entry in tensor.entries(stored)]
    # `weight_shape` is of files alone.
    expected = sum(entry.num_bytes for entry in exported if not entry.name.endswith("_shape"))
    assert pushed_bytes(model, weights).total == expected


def test_float32_rounds_nothing() -> None:
    model = compose(["experiment=smoke"]).model
    pushed = pushed_bytes(model, EngineWeights.float32)
    assert pushed.total == 4 * sum(tensor.size for tensor in released_tensors(model))


def test_published_pushes_are_planned_within_a_tenth() -> None:
    for each in PUBLISHED:
        planned = broadcast_s(each.num_bytes, is_one_node=each.is_one_node)
        assert planned == pytest.approx(each.seconds, rel=0.1), each.what


def test_the_1t_model_gets_to_256_gpus_sooner_than_k2_did() -> None:
    config = compose(JOB)
    by_way = {plan.way: plan for plan in plan_pushes(config, EngineWeights.int4)}
    assert 0.55e12 < by_way["checkpoint_engine"].num_bytes < 0.65e12
    assert by_way["checkpoint_engine"].seconds < 16.04
    assert by_way["shared_memory"].seconds > 5 * by_way["checkpoint_engine"].seconds
    in_bf16 = {plan.way: plan for plan in plan_pushes(config, EngineWeights.bf16)}
    assert in_bf16["checkpoint_engine"].seconds < 30
    assert in_bf16["nccl"].seconds > in_bf16["checkpoint_engine"].seconds


def test_the_command_prints_both_and_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of_command(main, "rl", *JOB) == 0
    printed = capsys.readouterr().out
    assert "595.1 GB" in printed and "Kimi-K2 FP8, 256 H20" in printed and "16.04" in printed
    assert status_of_command(main, "rl", *JOB, "--json", "--weights", "bf16") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == "bf16" and found["pushes"]["nccl"]["seconds"] > 30

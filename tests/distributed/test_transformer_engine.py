"""The model builds and computes the same with Transformer Engine's modules, shown with a stand-in on the CPU.

The real ones are tested in `tests/gpu`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

from k25_train.compose.resolve import compose
from k25_train.config.basics import DType
from k25_train.config.cluster import Device
from k25_train.plan.memory.kernels import kernels_of
from k25_train.plan.memory.saved_tensors import SavedTensors
from k25_train.plan.pass_sizes import PassSizes
from tests.helpers.project_sources import REPO
from tests.helpers.runs import SHRUNK, layout

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.transformer_engine_twin"],
        cwd=REPO,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_linear_layers_and_norms_are_transformer_engines(found: dict[str, Any]) -> None:
    assert {"TEColumnParallelLinear", "TERowParallelLinear", "RMSNorm"} <= set(found["modules"])


def test_the_latent_norms_keep_their_own_epsilon(found: dict[str, Any]) -> None:
    epsilons = found["epsilons"]
    assert epsilons["q_layernorm"] == epsilons["kv_layernorm"] == 1e-6
    assert epsilons["input_layernorm"] == epsilons["pre_mlp_layernorm"] == epsilons["final_layernorm"] == 1e-5


def test_names_are_the_same_and_extra_states_are_no_weights(found: dict[str, Any]) -> None:
    for key in ("parameters", "global names", "gradients"):
        ours, twin = found[key]
        assert len(ours) > 60
        assert twin == ours
    assert not any("_extra_state" in name for name in found["global names"][1])


def test_each_grouped_layer_is_three_grouped_products(found: dict[str, Any]) -> None:
    layouts = found["grouped products"]
    assert layouts[: len(layouts) // 3] == ["TN"] * (len(layouts) // 3), "forward"
    assert layouts[len(layouts) // 3 :] == ["NN", "NT"] * (len(layouts) // 3), "backward"
    assert len(layouts) >= 2 * 3


def test_losses_and_gradients_are_the_same_in_bfloat16(found: dict[str, Any]) -> None:
    assert found["difference"] == 0.0


def test_attention_is_one_call_per_layer_with_its_constant_shape(found: dict[str, Any]) -> None:
    calls = found["attention"]
    assert len(calls) == len(found["logits"][1])
    assert {tuple(call["longest"]) for call in calls} == {(128, 128)}
    assert {call["documents"] for call in calls} == {32}
    assert all(call["padded"] and call["max logits"] for call in calls)


def test_largest_logits_are_those_of_the_cpus_path(found: dict[str, Any]) -> None:
    ours, twin = (torch.tensor(each) for each in found["logits"])
    # Both are rounded to bfloat16.
    torch.testing.assert_close(twin, ours, rtol=8e-3, atol=0)


def test_the_plan_lists_what_attention_saves(found: dict[str, Any]) -> None:
    config = compose([*SHRUNK, *layout()])
    sizes = PassSizes(
        documents=(50, 58, 20), padding_tokens=20, num_sequences=1, expert_rows=1, local_experts=1, patches=0,
        vision_tokens=0,
    )  # fmt: skip
    kernels = kernels_of(Device.cuda, DType.bfloat16, transformer_engine=True)
    lists = SavedTensors(config.model, DType.bfloat16, kernels, config.activation.policies(), sizes)
    layers = range(config.model.num_layers)
    planned = lists.every_chunk(layers) + [each for _ in layers for each in lists.layer(is_moe=True)]
    expected = Counter(
        (each.name, each.shape, each.memory_bytes) for each in planned if each.name.startswith("attention.")
    )
    assert Counter((name, tuple(shape), size) for name, shape, size in found["saved"]) == expected

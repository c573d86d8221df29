"""The model builds and computes the same with Transformer Engine's modules, shown with a stand-in on the CPU.

The real ones are tested in `tests/gpu`.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.project_sources import REPO

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


def test_losses_and_gradients_are_the_same_in_bfloat16(found: dict[str, Any]) -> None:
    assert found["difference"] == 0.0

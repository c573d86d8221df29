"""Activation policies on a GPU: kernels, streams and page-locked memory in place of their twins."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from parallel.activations.offload import OffloadEngine
from parallel.activations.order import OffloadOrder
from parallel.activations.policy import Policy
from parallel.host.copier import CudaCopier
from tests.helpers.activation_policies import EXACT_K2, OFFLOAD, RECOMPUTE
from tests.helpers.gpu import alone, in_fresh_process, on_gpu
from tests.helpers.ranks import RankContext
from tests.helpers.runs import train
from tests.helpers.saving_pass_blocks import all_of, run
from tests.helpers.tiny_shards import write_tiny_shard_set

pytestmark = pytest.mark.gpu


@pytest.fixture
def engine() -> Iterator[OffloadEngine]:
    made = OffloadEngine(CudaCopier(torch.device("cuda", torch.cuda.current_device())), 8 << 20, 1 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("policy", [Policy.keep, Policy.recompute, Policy.offload])
def test_exact_policies_give_the_same_bits(engine: OffloadEngine, policy: Policy) -> None:
    for ours, plain in zip(run(all_of(policy), engine, device="cuda"), run(None, device="cuda"), strict=True):
        assert torch.equal(ours, plain)
    engine.check_empty()


@pytest.mark.parametrize("policy", [Policy.fp8, Policy.fp8_offload])
def test_fp8_gradients_are_near(engine: OffloadEngine, policy: Policy) -> None:
    ours = run(all_of(Policy.keep, hidden=policy), engine, device="cuda")
    for mine, exact in zip(ours, run(None, device="cuda"), strict=True):
        assert (mine - exact).norm() < 2**-4 * exact.norm()
    engine.check_empty()


def train_offloading_all(context: RankContext, arguments: Sequence[str]) -> list[tuple[float, float]]:
    """Training that takes all passes to the host: alone, a backward pass comes too soon to be worth it."""
    from k25_train.training import activations

    activations.offload_order = lambda *_: OffloadOrder(frozenset(), {})
    return train(context, arguments)


@pytest.mark.parametrize("policies", [RECOMPUTE, OFFLOAD, EXACT_K2], ids=["recompute", "offload", "both"])
@pytest.mark.parametrize("transformer_engine", ["true", "false"])
def test_training_is_bitwise_alike(
    data: Path, tmp_path: Path, policies: tuple[str, ...], transformer_engine: str
) -> None:
    if transformer_engine == "true":
        pytest.importorskip("transformer_engine")
    more = [f"train.transformer_engine={transformer_engine}", "train.steps=4", "optim.warmup=1"]
    # Without, kernels may add up in another order in each run: then nothing says that bits are the same.
    more += ["optim.decay=1", "train.deterministic=true"]
    kept = in_fresh_process(train, alone(), on_gpu(data, tmp_path / "kept", *more))
    budgets = ["activation.host_gib=0.25", "activation.device_gib=0.01"]
    arguments = on_gpu(data, tmp_path / "run", *more, *policies, *budgets)
    assert in_fresh_process(train_offloading_all, alone(), arguments) == kept

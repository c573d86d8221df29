"""Nothing makes the host wait for a GPU within a step's passes but the token dispatcher, and outside of them
only what the host decides by, once a step: seen on fake CUDA tensors."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.blocking_parts import (
    GPU,
    LAYERS,
    ONCE_A_STEP,
    PARTS,
    ByPart,
    blocking_by_part,
    not_allowed,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import layout, overrides

pytestmark = pytest.mark.distributed


def observe(data: Path, folder: Path, *more: str, ranks: int = 2, kernels: Sequence[str] = ()) -> ByPart:
    """What blocks on the first rank."""
    arguments = overrides(data, folder, *GPU, *more)
    return run_ranks(blocking_by_part, ranks, arguments, kernels, timeout_s=400.0)[0]


@pytest.fixture(scope="module")
def found(data: Path, tmp_path_factory: pytest.TempPathFactory) -> ByPart:
    small = ("model.num_layers=3", "train.global_batch_size=4")
    return observe(data, tmp_path_factory.mktemp("run"), *layout(ep=2, dp=2), *small)


def test_a_step_and_its_modules_block_only_where_they_may(found: ByPart) -> None:
    assert sorted(found) == sorted((*PARTS, *LAYERS))
    assert not_allowed(found) == []


def test_what_the_host_decides_by_is_read_once_a_step(found: ByPart) -> None:
    for part, places in ONCE_A_STEP.items():
        assert len(found[part]) <= len(places), found[part]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        # The room for offloaded tensors is planned for the CPU's attention; the faked GPU's saves others.
        (*layout(pp=2, vpp=2, ep=2, dp=2), "dep.schedule=bubbles", "activation.host_gib=1"),
        (*layout(ep=2, dp=2), "optim=muonclip_in_host"),
        (*layout(ep=2, dp=2), "activation=keep", "dep.mode=coupled"),
    ],
    ids=["bubbles", "optimizer in the host", "coupled tower"],
)
def test_other_mechanisms_block_only_where_they_may(
    more: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    ranks = 4 if "parallelism.pp=2" in more else 2
    assert not_allowed(observe(data, tmp_path, *more, ranks=ranks)) == []


ATTENTION = {
    "bfloat16": ["torch_attn._varlen_attn", "torch_attn._varlen_attn_backward", "k25.largest_logits"],
    "float32": ["aten._efficient_attention_forward", "aten._efficient_attention_backward"],
}
"""What attends where ranks share sequences."""


@pytest.mark.parametrize("exchange", ["ring", pytest.param("all_gather", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_ranks_that_share_sequences_block_only_where_they_may(
    exchange: str, dtype: str, data: Path, tmp_path: Path
) -> None:
    shared = (
        "cluster=local_gpu",
        *layout(ep=2, cp=2),
        f"parallelism.cp_exchange={exchange}",
        f"train.dtype={dtype}",
        "model.num_layers=3",
        "train.global_batch_size=2",
    )
    assert not_allowed(observe(data, tmp_path, *shared, kernels=ATTENTION[dtype])) == []

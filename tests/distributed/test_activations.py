"""Training with activation policies: what is exact trains bitwise as without, in every layout and schedule."""

from pathlib import Path

import pytest

from tests.helpers.runs import layout, losses_of, overrides

pytestmark = pytest.mark.distributed

STEPS = ("train.steps=6", "optim.warmup_steps=2", "optim.decay_steps=2")
OFFLOAD_ALL = tuple(
    f"activation.{name}=offload"
    for name in (
        "norm.input norm.output mla.latent mla.up_input mla.up_proj mla.rotations attention.output "
        "attention.joined router.scores moe.up_input moe.swiglu_input moe.down_input moe.probs "
        "shared_expert.swiglu_input shared_expert.down_input dense.swiglu_input dense.down_input head.logits "
        "vision.encoder rest"
    ).split()
)
RECOMPUTE = tuple(
    f"activation.{name}=recompute"
    for name in (
        "norm.output mla.up_input mla.up_proj attention.joined moe.down_input shared_expert.down_input "
        "dense.down_input"
    ).split()
)
K2_WITHOUT_FP8 = (
    "activation=k2",
    *(
        f"activation.{name}=offload"
        for name in "moe.up_input moe.swiglu_input shared_expert.swiglu_input dense.swiglu_input".split()
    ),
)
OVERLAP = ("parallelism.overlap_expert_comm=true", "parallelism.delay_wgrad=true")
EXACT = {"recompute": RECOMPUTE, "offload": OFFLOAD_ALL, "both": K2_WITHOUT_FP8}
LAYOUTS = {
    "alone": (1, layout()),
    "pp2": (2, layout(pp=2)),
    "pp2 vpp2": (2, layout(pp=2, vpp=2)),
    "ep2 overlap": (2, [*layout(ep=2, dp=2), *OVERLAP]),
    "pp2 vpp2 ep2 overlap": (4, [*layout(pp=2, vpp=2, ep=2, dp=2), *OVERLAP]),
}


def run(data: Path, tmp_path: Path, num_ranks: int, *more: str) -> list[tuple[float, float]]:
    return losses_of(overrides(data, tmp_path / "run", *STEPS, *more), num_ranks)


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_exact_policies_train_bitwise_alike(data: Path, tmp_path: Path, sizes: str) -> None:
    num_ranks, more = LAYOUTS[sizes]
    kept = run(data, tmp_path, num_ranks, *more)
    for name, policies in EXACT.items():
        assert run(data, tmp_path, num_ranks, *more, *policies) == kept, name


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_k2_trains_nearly_alike(data: Path, tmp_path: Path, sizes: str) -> None:
    num_ranks, more = LAYOUTS[sizes]
    kept = run(data, tmp_path, num_ranks, *more)
    k2 = run(data, tmp_path, num_ranks, *more, "activation=k2")
    assert k2[0][0] == kept[0][0], "the first loss comes before any gradient"
    assert k2 != kept
    for (loss, norm), (exact_loss, exact_norm) in zip(k2, kept, strict=True):
        assert loss == pytest.approx(exact_loss, rel=5e-3)
        assert norm == pytest.approx(exact_norm, rel=5e-2)

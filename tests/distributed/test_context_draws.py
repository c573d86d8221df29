"""Any legal layout in which ranks share sequences trains like one process, with whatever else is drawn."""

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from tests.helpers.activation_policies import EXACT_K2, OFFLOAD, RECOMPUTE
from tests.helpers.encoder_ways import WAYS
from tests.helpers.parity import (
    CLIPPED,
    DATA_OVERLAPS,
    EVERYTHING_OVERLAPS,
    TOLERANCE,
    Case,
    Parity,
)
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

FEW = ("train.steps=4", "optim.warmup=1", "optim.decay=1")
COUNTS = "model.balance_loss_coeff=0.1"
"""With it the balance loss counts."""
RULES = {"muonclip": (*CLIPPED, COUNTS), "adamw": ("optim=adamw", COUNTS)}
"""Changes that both runs get: the optimizer's rule."""
POLICIES = {
    "keep": (),
    "selective": ("activation=selective",),
    "k2": EXACT_K2,
    "recompute": RECOMPUTE,
    "offload": OFFLOAD,
}
"""Recipes of activations; that which rounds without rounding."""
EVERYTHING = Case(
    {"pp": 2, "vpp": 2, "ep": 2, "cp": 2},
    global_batch_size=8,
    more=(
        *EVERYTHING_OVERLAPS,
        *EXACT_K2,
        *WAYS["bubbles"],
        "activation.head.logits=recompute",
        "parallelism.cp_exchange=ring",
        "train.micro_batch_size=2",
    ),
)
"""All that overlaps, recomputes, offloads and shares at once."""
NUM_DRAWN = 60


def test_everything_at_once_trains_like_one_process(parity: Parity) -> None:
    assert parity.difference(EVERYTHING, *RULES["muonclip"], *FEW) <= TOLERANCE


def draw_case(number: int, max_ranks: int = 8) -> tuple[Case, str]:
    """A layout with what else must not change the result, and the optimizer's rule."""
    draw = random.Random(number).choice
    cp = draw([2, 2, 4])
    pp = draw([size for size in (1, 2, 4) if size * cp <= max_ranks])
    dp = draw([size for size in (1, 2, 4) if pp * cp * size <= max_ranks])
    ep = draw([size for size in (1, 2, 4) if dp * cp % size == 0])
    vpp = draw([1, 2] if pp > 1 else [1])
    overlaps = EVERYTHING_OVERLAPS if ep > 1 and (vpp > 1 or pp == 1) else DATA_OVERLAPS
    more = (
        f"train.micro_batch_size={draw([1, 2])}",
        f"parallelism.cp_exchange={draw(['all_gather', 'ring'])}",
        *WAYS[draw(sorted(WAYS))],
        *POLICIES[draw(sorted(POLICIES))],
        *draw([(), overlaps]),
        *draw([(), ("optim.offload=cpu",)]),
    )
    return Case({"pp": pp, "vpp": vpp, "ep": ep, "dp": dp, "cp": cp}, 8, 16, more), draw(sorted(RULES))


def legal_cases(number: int, parity: Parity) -> Iterator[tuple[Case, str]]:
    """What is drawn until the configuration refuses nothing of it; then more."""
    for attempt in range(100):
        case, rule = draw_case(100 * number + attempt)
        with suppress(ConfigError):
            compose([*parity.arguments(case), *RULES[rule]])
            yield case, rule


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_DRAWN))
def test_drawn_layouts_train_like_one_process(number: int, parity: Parity) -> None:
    """With `-s` each says how far it is."""
    case, rule = next(legal_cases(number, parity))
    difference = parity.difference(case, *RULES[rule])
    print(f"{difference:.1e}  {rule}  {case.name}")
    assert difference <= TOLERANCE


def exchange_in_use(context: RankContext, arguments: Sequence[str]) -> tuple[str, str]:
    """What the layers exchange latents by, and what the plan says."""
    run = start_run(context, arguments)
    from k25_train.model.context_attention import SharedDocumentAttention
    from k25_train.plan.context import exchange_of

    (kind,) = {
        type(module._exchange).__name__
        for chunk in run.chunks
        for module in chunk.modules()
        if isinstance(module, SharedDocumentAttention)
    }
    return {"AllGather": "all_gather", "Ring": "ring"}[kind], exchange_of(run.config).value


@pytest.mark.parametrize("kind", ["null", "all_gather"])
def test_layers_exchange_as_planned(kind: str, data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path, *layout(cp=2), f"parallelism.cp_exchange={kind}")
    found = run_ranks(exchange_in_use, 2, arguments)
    planned = "ring" if kind == "null" else kind
    assert found == [(planned, planned)] * 2

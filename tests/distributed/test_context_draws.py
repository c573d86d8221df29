"""Any legal layout in which ranks share sequences trains like one process, with whatever else is drawn."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.activation_policies import EXACT_K2
from tests.helpers.context_draws import RULES, legal_cases
from tests.helpers.encoder_ways import WAYS
from tests.helpers.parity import (
    EVERYTHING_OVERLAPS,
    TOLERANCE,
    Case,
    Parity,
)
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

FEW = ("train.steps=4", "optim.warmup=1", "optim.decay=1")
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

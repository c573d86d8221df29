"""Parallel equals serial: any layout trains like one process, in float32 to 1e-5 over 20 steps."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from tests.helpers.parity import (
    BFLOAT16_CASES,
    BFLOAT16_TOLERANCE,
    CASES,
    CLIPPED,
    CUDA_CASES,
    CUDA_TOLERANCE,
    DATA_OVERLAPS,
    DEEPEST,
    EVERYTHING_OVERLAPS,
    FEW_OR_ALL_STEPS,
    FEW_STEPS,
    LOW_LEARNING_RATE,
    SLOW_CASES,
    TOLERANCE,
    Case,
    Parity,
    sweep,
)

pytestmark = pytest.mark.distributed


def test_the_serial_run_learns(parity: Parity) -> None:
    losses = parity.serial(5, 8, "optim.lr=3e-3")
    assert len(losses) == 20
    assert losses[-1][0] < 0.9 * losses[0][0]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW_CASES else []) for case in CASES],
    ids=lambda case: case.name,
)
@FEW_OR_ALL_STEPS
def test_a_layout_trains_like_one_process(case: Case, steps: Sequence[str], parity: Parity) -> None:
    # With 32 layers the choice of an expert tips in step 8, for one process and other micro-batches too.
    changes = LOW_LEARNING_RATE if case.num_layers >= 32 else ()
    assert parity.difference(case, *steps, *changes) <= TOLERANCE


def test_adamw_trains_like_one_process(parity: Parity) -> None:
    case = Case({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, more=EVERYTHING_OVERLAPS)
    assert parity.difference(case, "optim=adamw", *FEW_STEPS) <= TOLERANCE


def test_a_direct_query_trains_like_one_process(parity: Parity) -> None:
    case = Case({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, more=EVERYTHING_OVERLAPS)
    assert parity.difference(case, "model.q_lora_rank=null", *CLIPPED, *FEW_STEPS) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_whose_heads_are_clipped_trains_like_one_process(case: Case, parity: Parity) -> None:
    assert parity.difference(case, *CLIPPED) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_trains_with_adamw_like_one_process(case: Case, parity: Parity) -> None:
    assert parity.difference(case, "optim=adamw") <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", list(sweep()), ids=lambda case: case.name)
def test_every_layout_on_16_ranks_trains_like_one_process(case: Case, parity: Parity) -> None:
    changes = LOW_LEARNING_RATE if case.num_layers == DEEPEST else ()
    assert parity.difference(case, *changes) <= TOLERANCE


@FEW_OR_ALL_STEPS
@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=lambda case: case.name)
def test_layouts_agree_in_bfloat16_as_far_as_it_goes(
    case: Case, steps: Sequence[str], parity: Parity
) -> None:
    assert parity.difference(case, "train.dtype=bfloat16", *steps) <= BFLOAT16_TOLERANCE


@pytest.fixture(scope="session")
def parity_on_gpus(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    return Parity(data, tmp_path_factory.mktemp("parity_on_gpus"), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [((), CUDA_TOLERANCE), (("train.dtype=bfloat16",), BFLOAT16_TOLERANCE)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.gpus(case.num_ranks)) for case in CUDA_CASES],
    ids=lambda case: case.name,
)
def test_a_layout_over_nccl_trains_like_one_gpu(
    case: Case, changes: Sequence[str], tolerance: float, parity_on_gpus: Parity
) -> None:
    assert parity_on_gpus.difference(case, *changes, *FEW_STEPS) <= tolerance


@st.composite
def drawn_cases(draw: st.DrawFn, max_ranks: int) -> Case:
    """A layout with a cut, a batch and overlaps of its own, mostly one that the configuration accepts."""
    pp = draw(st.sampled_from([size for size in (1, 2, 3, 4, 8, 16) if size <= max_ranks]))
    dp = draw(st.sampled_from([size for size in (1, 2, 4) if pp * size <= max_ranks]))
    ep = draw(st.sampled_from([size for size in (1, 2, 4) if dp % size == 0]))
    vpp = draw(st.integers(1, 4 if pp > 1 else 1))
    num_layers = draw(st.sampled_from([depth for depth in (5, 16, 32, 64) if depth >= pp * vpp - 1][:2]))
    micro_batch_size = draw(st.sampled_from([1, 2]))
    num_micro_batches = draw(st.integers(pp if vpp > 1 else 1, 2 * pp + 1))
    overlaps = EVERYTHING_OVERLAPS if ep > 1 and (vpp > 1 or pp == 1) else DATA_OVERLAPS
    more = [f"train.micro_batch_size={micro_batch_size}", *draw(st.sampled_from([(), overlaps]))]
    if draw(st.booleans()):
        more.append(f"parallelism.layout='{draw(drawn_layouts(num_layers, pp * vpp))}'")
    global_batch_size = num_micro_batches * micro_batch_size * dp
    return Case({"pp": pp, "vpp": vpp, "ep": ep, "dp": dp}, num_layers, global_batch_size, tuple(more))


@st.composite
def drawn_layouts(draw: st.DrawFn, num_layers: int, num_chunks: int) -> str:
    """Layers cut into chunks at random; each but the last has at least one."""
    places, num_cuts = st.integers(1, num_layers), num_chunks - 1
    cuts = draw(st.lists(places, min_size=num_cuts, max_size=num_cuts, unique=True))
    bounds = [0, *sorted(cuts), num_layers]
    return "E" + "|".join("t" * (end - start) for start, end in itertools.pairwise(bounds)) + "L"


def check_drawn(case: Case, parity: Parity, *more: str) -> None:
    """Compare a case with one process, unless the configuration refuses it."""
    try:
        compose([*parity.arguments(case), *more])
    except ConfigError:
        reject()
    assert parity.difference(case, *more) <= TOLERANCE


@settings(max_examples=5, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(case=drawn_cases(max_ranks=4))
def test_any_legal_layout_trains_like_one_process(case: Case, parity: Parity) -> None:
    check_drawn(case, parity, "train.steps=6", "optim.warmup=2", "optim.decay=2")


@pytest.mark.slow
@settings(max_examples=30, deadline=None, database=None, phases=[Phase.generate])
@given(case=drawn_cases(max_ranks=16))
def test_any_legal_layout_on_16_ranks_trains_like_one_process(case: Case, parity: Parity) -> None:
    check_drawn(case, parity)

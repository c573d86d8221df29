"""Muon on shards against whole matrices updated plainly, in every kind of layout."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.interrupted_runs import rows
from tests.helpers.muon_reference import orthogonal, train_plainly
from tests.helpers.parity import EVERYTHING_OVERLAPS, worst_difference
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, overrides, start_run, train

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
MUON = ("optim=muonclip", "optim.qk_clip_threshold=null", "optim.lr=1e-3")
SMOKE_LAYOUT = {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}
FEW = ("train.steps=6", "optim.warmup=2", "optim.decay=2")
"""For variations of the update, which every step shows."""
LAYOUTS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "one process": ({}, ()),
    "dp2": ({"dp": 2}, ()),
    "dp4": ({"dp": 4}, ()),
    "ep2 x dp4": ({"ep": 2, "dp": 4}, ()),
    "ep2 x dp4, 6 steps": ({"ep": 2, "dp": 4}, FEW),
    "pp2 x vpp2 x ep2": (SMOKE_LAYOUT, ()),
    "pp2 x vpp2 x ep2, everything overlaps": (SMOKE_LAYOUT, EVERYTHING_OVERLAPS),
    "pp2 x vpp2 x ep2, everything overlaps, 6 steps": (SMOKE_LAYOUT, (*EVERYTHING_OVERLAPS, *FEW)),
    "dp2, plain momentum": ({"dp": 2}, ("optim.muon.nesterov=false", *FEW)),
    "dp2, many rounds": ({"dp": 2}, ("optim.muon.exchange_mib=1", "model.hidden_size=128", *FEW)),
}
SLOW = (
    "one process",
    "dp2",
    "dp4",
    "ep2 x dp4",
    "pp2 x vpp2 x ep2",
    "pp2 x vpp2 x ep2, everything overlaps",
)
"""Those that others cover, all or in fewer steps: for `make test-slow`."""


def num_ranks(sizes: dict[str, int]) -> int:
    return sizes.get("pp", 1) * sizes.get("dp", 1)


def update(_context: RankContext, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(ours, the papers' in float64) update of a batch of matrices, before the factor for their shape."""
    from k25_train.compose.resolve import compose
    from k25_train.optim.muon import Muon
    from parallel.megatron.state_store import ResidentStore

    settings = compose(["experiment=smoke"]).optim.muon
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    muon = Muon([{"params": [torch.zeros(1)]}], ResidentStore(), settings)
    plain = [orthogonal(matrix) for matrix in matrices.double()]
    return muon._orthogonalize(matrices) / (0.2 * max(shape[1:]) ** 0.5), torch.stack(plain)


@pytest.mark.parametrize(
    "shape", [(1, 48, 48), (1, 96, 24), (1, 24, 96), (6, 32, 48)], ids=["square", "tall", "wide", "stacked"]
)
def test_an_update_is_the_papers(shape: tuple[int, ...]) -> None:
    found, expected = run_ranks(update, 1, shape)[0]
    # Entries are below 1. Five steps in float32 round the whole matrix by 1.3e-6, a single entry by up to
    # 1.4e-6 where a processor's kernels add in an unlucky order.
    assert float((found - expected).abs().max()) <= 2e-6
    assert float((found - expected).norm() / expected.norm()) <= 2e-6


def operands(_context: RankContext, dtype: str) -> set[torch.dtype]:
    """Formats of the operands of Newton-Schulz's products."""
    from k25_train.compose.resolve import compose
    from k25_train.optim.muon import Muon
    from parallel.megatron.state_store import ResidentStore

    found: set[torch.dtype] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
                found.update(each.dtype for each in args if torch.is_tensor(each))
            return func(*args, **(kwargs or {}))

    settings = compose(["experiment=smoke", f"optim.muon.newton_schulz_dtype={dtype}"]).optim.muon
    with Watch():
        Muon([{"params": [torch.zeros(1)]}], ResidentStore(), settings)._orthogonalize(torch.randn(2, 8, 6))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_in_the_format_that_is_configured(dtype: str) -> None:
    """Operands are converted on any device; torch's "medium" precision alone would leave them in float32."""
    assert run_ranks(operands, 1, dtype) == [{getattr(torch, dtype)}]


def normalized(_context: RankContext, shape: tuple[int, ...]) -> list[float]:
    """Norms of matrices of different sizes, and of one of zeros, before the first Newton-Schulz step."""
    from k25_train.compose.resolve import compose
    from k25_train.optim.muon import Muon
    from parallel.megatron.state_store import ResidentStore

    settings = compose(["experiment=smoke"]).optim.muon
    settings.newton_schulz_steps, settings.update_rms = 0, max(shape[1:]) ** -0.5
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrices[0] *= 1e-3
    matrices[1:] *= 1e3
    matrices[2] = 0
    expected = torch.stack([matrix / matrix.double().square().sum().sqrt() for matrix in matrices[:2]])
    found = Muon([{"params": [torch.zeros(1)]}], ResidentStore(), settings)._orthogonalize(matrices)
    assert not found[2].any()
    return ((found[:2] - expected).double().norm(dim=(1, 2))).tolist()


@pytest.mark.parametrize(
    "shape",
    [(3, 1000, 1000), (3, 2000, 3000), pytest.param((3, 5000, 10000), marks=pytest.mark.slow)],
    ids=lambda shape: f"{shape[1] * shape[2]:,}",
)
def test_a_matrix_is_normalized_exactly_whatever_its_size(shape: tuple[int, ...]) -> None:
    assert max(run_ranks(normalized, 1, shape)[0]) < 1e-6


Plain = Callable[..., list[tuple[float, float]]]


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Losses and gradient norms of whole matrices updated plainly, by overrides that change the model."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def losses(*changes: str) -> list[tuple[float, float]]:
        return run_ranks(train_plainly, 1, overrides(data, folder, *layout(), *MUON, *changes))[0]

    return losses


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_a_layout_trains_as_whole_matrices_do(name: str, plain: Plain, data: Path, tmp_path: Path) -> None:
    sizes, more = LAYOUTS[name]
    expected = plain(
        *(key for key in more if key in FEW or key.startswith(("model.", "optim.muon.nesterov")))
    )
    found, *_ = run_ranks(
        train, num_ranks(sizes), overrides(data, tmp_path, *layout(**sizes), *MUON, *more), timeout_s=300.0
    )
    assert len(expected) == (6 if FEW[0] in more else 20)
    assert worst_difference(found, expected) <= TOLERANCE


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process, with checkpoints at steps 10 and 20."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(fit, 1, overrides(data, folder, *layout(), *MUON))
    return folder


# With clipping `test_resume.py` does it in every run of the tests.
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"dp": 4}, SMOKE_LAYOUT], ids=["dp4", "pp2 x vpp2 x ep2"])
def test_a_checkpoint_goes_on_in_another_layout(
    sizes: dict[str, int], uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step_20")
    run_ranks(fit, num_ranks(sizes), overrides(data, run, *layout(**sizes), *MUON), timeout_s=300.0)
    found, expected = (
        [(float(row["loss"]), float(row["grad_norm"])) for row in rows(folder) if "loss" in row]
        for folder in (run, uninterrupted)
    )
    assert worst_difference(found, expected) <= TOLERANCE


def state_bytes(context: RankContext, arguments: list[str]) -> tuple[int, int, int]:
    """(bytes of Muon's state and masters, elements of its shards, of all its parameters on this rank)."""
    from k25_train.optim.muon import Muon
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        train_step(run, 1)
    kept = shards = whole = 0
    for part in run.optimizer.chained_optimizers:
        if isinstance(part.optimizer, Muon):
            for master, state in part.optimizer.state.items():
                kept += master.nbytes + sum(tensor.nbytes for tensor in state.values() if tensor.dim())
                shards += master.numel()
            whole += sum(parameter.numel() for buffer in part.buffers for parameter in buffer.params)
    return kept, shards, whole


def test_state_is_a_master_and_a_momentum_cut_over_the_ranks(data: Path, tmp_path: Path) -> None:
    for ranks in (1, 2, 4):
        arguments = overrides(data, tmp_path, *layout(dp=ranks), *MUON, "train.dtype=bfloat16")
        by_rank = run_ranks(state_bytes, ranks, arguments)
        wholes = {whole for _, _, whole in by_rank}
        assert len(wholes) == 1
        assert all(kept == 8 * shards for kept, shards, _ in by_rank)
        assert sum(shards for _, shards, _ in by_rank) == wholes.pop()


def decays(context: RankContext, arguments: list[str]) -> list[tuple[int, float]]:
    """(axes, weight decay) of every parameter."""
    run = start_run(context, arguments)
    return [
        (parameter.dim(), part.optimizer.param_groups[shard.group]["weight_decay"])
        for part in run.optimizer.chained_optimizers
        for parameter, shard in part.shards().items()
    ]


@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_norms_and_biases_do_not_decay(name: str, data: Path, tmp_path: Path) -> None:
    found = run_ranks(decays, 1, overrides(data, tmp_path, *layout(), f"optim={name}"))[0]
    assert {(axes > 1, decay) for axes, decay in found} == {(True, 0.1), (False, 0.0)}

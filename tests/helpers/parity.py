"""Layouts to compare with one process, and the runs that compare them."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import layout, overrides, train

TOLERANCE = 1e-5
"""Largest relative difference of a loss or a gradient norm over 20 steps in float32."""

FIRST_LOSS_TOLERANCE = 1e-8
"""Largest relative difference of the loss before the first update. A decoupled tower multiplies matrices of
another number of rows, for which some processors' kernels add in another order; nothing else may differ."""

BFLOAT16_TOLERANCE = 0.02
"""bfloat16 rounds a value by up to 0.4%, and layouts round sums at other places."""

CUDA_TOLERANCE = 1e-4
"""The same on GPUs, over 8 steps: cuBLAS chooses another kernel for another number of rows, and atomics add
up the embedding's gradient in any order; each step's difference of 1e-7 to 1e-6 goes through the update of
all weights after it. A wrong group, a swapped message or a lost gradient shows at 1e-2."""

Losses = list[tuple[float, float]]
"""Loss and gradient norm of each step."""

NARROW = (
    "model.hidden_size=32 model.q_lora_rank=16 model.qk_nope_head_dim=8 model.qk_rope_head_dim=8 "
    "model.v_head_dim=8 model.dense_ffn_hidden_size=48 model.expert_ffn_hidden_size=16 "
    "train.seq_len=96 train.eval_sequences=32 "
    # At a higher rate training is chaotic: a token that chooses between two experts of nearly equal score
    # makes 1e-7 into 1e-5 within 20 steps, whichever way the float32 sums are ordered.
    "optim.lr=3e-4 optim.min_lr=1e-4"
).split()
"""Overrides that make many layers cheap."""


FEW_STEPS = ("train.steps=8", "optim.warmup=2", "optim.decay=2")
"""Overrides of the run that is compared by default; `make test-slow` compares all 20 steps."""
FEW_OR_ALL_STEPS = pytest.mark.parametrize(
    "steps", [FEW_STEPS, pytest.param((), marks=pytest.mark.slow)], ids=["8 steps", "20 steps"]
)
DATA_OVERLAPS = ("parallelism.overlap_grad_reduce=true", "parallelism.overlap_param_gather=true")
EVERYTHING_OVERLAPS = (
    *DATA_OVERLAPS,
    "parallelism.overlap_expert_comm=true",
    "parallelism.delay_wgrad=true",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One layout of a model with `num_layers` layers."""

    sizes: Mapping[str, int]
    """pp, vpp, ep, dp, cp; those left out are 1."""
    num_layers: int = 5
    global_batch_size: int = 16
    more: tuple[str, ...] = field(default=())
    """Further overrides that must not change the result, e.g. micro-batch size or overlap."""

    @property
    def num_ranks(self) -> int:
        return math.prod(self.sizes.get(name, 1) for name in ("pp", "dp", "cp"))

    @property
    def name(self) -> str:
        """Sizes above 1, e.g. `pp4 vpp2 ep4 dp4`, then what else is set."""
        sizes = [f"{name}{size}" for name, size in self.sizes.items() if size > 1]
        batch = f"{self.num_layers} layers, {self.global_batch_size} sequences"
        return " ".join([*sizes, batch, *(key.partition(".")[2] for key in self.more)])


class Parity:
    """Losses of layouts and of one process; each run is made once."""

    def __init__(self, data: Path, folder: Path, device: str = "cpu") -> None:
        """`device` is cpu, over gloo, or cuda, over NCCL, with a GPU for each rank."""
        self._data, self._folder, self._device = data, folder, device
        self._found: dict[tuple[str, ...], Losses] = {}

    def serial(self, num_layers: int, global_batch_size: int, *changes: str) -> Losses:
        """One process with a coupled tower, up to 4 sequences a micro-batch."""
        plainest = ("dep.mode=coupled", f"train.micro_batch_size={math.gcd(global_batch_size, 4)}")
        return self.losses(Case({}, num_layers, global_batch_size, (*plainest, *changes)))

    def losses(self, case: Case) -> Losses:
        """The layout's losses, the same on every rank, which is checked."""
        arguments = self.arguments(case)
        key = tuple(arguments)
        if key not in self._found:
            by_rank = run_ranks(train, case.num_ranks, arguments, timeout_s=900.0, device=self._device)
            assert all(losses == by_rank[0] for losses in by_rank), "ranks report different losses"
            self._found[key] = by_rank[0]
        return self._found[key]

    def arguments(self, case: Case) -> list[str]:
        """The overrides of the layout's run."""
        model, batch = (
            f"model.num_layers={case.num_layers}",
            f"train.global_batch_size={case.global_batch_size}",
        )
        # First: what follows sets keys of the group.
        cluster = ["cluster=local_gpu"] if self._device == "cuda" else []
        sizes = [*cluster, *layout(**case.sizes)]
        return overrides(self._data, self._folder, *sizes, *NARROW, model, batch, *case.more)

    def difference(self, case: Case, *changes: str) -> float:
        """Largest relative difference from one process; `changes` are overrides that both get."""
        found = self.losses(replace(case, more=(*case.more, *changes)))
        return worst_difference(found, self.serial(case.num_layers, case.global_batch_size, *changes))


CASES = (
    Case({"dp": 4}),
    Case({"ep": 2, "dp": 4}),
    Case({"pp": 4}),
    Case({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}),
    Case({"pp": 2, "vpp": 2}, global_batch_size=20, more=("train.micro_batch_size=4",)),
    Case({"pp": 2, "ep": 2, "dp": 2}, more=("parallelism.layout='E|tttttL'",)),
    Case({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, more=("parallelism.layout='Et|ttt|t|L'",)),
    Case({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, more=EVERYTHING_OVERLAPS),
    Case({"pp": 4, "vpp": 2, "ep": 2, "dp": 2}, 8),
    Case({"pp": 4, "vpp": 2, "ep": 4, "dp": 4}, 16),
    Case({"pp": 16, "vpp": 2}, 32),
)
"""Each kind of parallelism alone, uneven layouts, all together, layouts of 8 and 16 ranks. `sweep` has the
rest."""
SLOW_CASES = (CASES[0], CASES[5], CASES[9], CASES[10])
"""Cases close to one that is always run: for `make test-slow`."""


COUPLED = "dep.mode=coupled"
CONTEXT_CASES = (
    Case({"pp": 2, "vpp": 2, "ep": 2, "cp": 2}, more=(COUPLED, "parallelism.cp_exchange=all_gather")),
    Case(
        {"ep": 4, "dp": 2, "cp": 2},
        more=(COUPLED, *EVERYTHING_OVERLAPS, "parallelism.cp_exchange=ring", "train.micro_batch_size=2"),
    ),
    Case({"cp": 2}, more=(COUPLED, "parallelism.cp_exchange=all_gather", "train.micro_batch_size=2")),
    Case({"cp": 4}, more=(COUPLED, "parallelism.cp_exchange=all_gather", "train.micro_batch_size=4")),
    Case({"pp": 2, "ep": 4, "cp": 4}, more=(COUPLED, *DATA_OVERLAPS, "parallelism.cp_exchange=ring")),
    Case(
        {"pp": 2, "vpp": 2, "ep": 4, "dp": 2, "cp": 2},
        more=(COUPLED, *EVERYTHING_OVERLAPS, "train.micro_batch_size=2"),
    ),
    Case({"pp": 4, "vpp": 2, "ep": 2, "cp": 2}, 16, more=(COUPLED, "parallelism.cp_exchange=ring")),
    Case({"ep": 2, "dp": 2, "cp": 4}, more=(COUPLED, "optim.offload=cpu")),
)
"""Ranks that share sequences, alone and with each other kind of parallelism. The first two are always run."""


CLIPPED = ("optim.qk_clip_threshold=0.02",)
"""A change with which QK-Clip scales heads in every step."""


BFLOAT16_CASES = (Case({"pp": 2, "vpp": 2}),)
"""What is compared in bfloat16 as well, one process in bfloat16 too."""


DEEPEST = 64
LOW_LEARNING_RATE = ("optim.lr=1e-4", "optim.min_lr=1e-5")
"""A change for the deepest model: at NARROW's rate the choice of an expert tips within ten steps, whichever
way sums are ordered; the steps before agree to 1e-6."""


BUBBLES = ("dep.schedule=bubbles",)
CUDA_CASES = (
    Case({"dp": 2}, more=DATA_OVERLAPS),
    Case({"ep": 2, "dp": 2}),
    Case({"pp": 2}),
    Case({"pp": 2, "vpp": 2}, more=BUBBLES),
    Case({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, more=(*EVERYTHING_OVERLAPS, *BUBBLES)),
    Case({"pp": 4, "vpp": 2, "ep": 2, "dp": 2}, 8, more=(*EVERYTHING_OVERLAPS, *BUBBLES)),
    Case({"cp": 2}, more=(COUPLED, "parallelism.cp_exchange=all_gather")),
    Case({"ep": 2, "cp": 2}, more=("parallelism.cp_exchange=ring", "train.micro_batch_size=2")),
    Case({"cp": 4}, more=(COUPLED, "parallelism.cp_exchange=ring")),
    Case({"pp": 2, "ep": 2, "cp": 2}, more=(*DATA_OVERLAPS, "parallelism.cp_exchange=all_gather")),
)
"""What is compared over NCCL, on two, four and eight GPUs: each kind of communicator, then all together."""


def sweep() -> Iterator[Case]:
    """Every combination of pp 1 to 16, vpp 1 to 4, dp 1 to 4 and ep 1 to 4 on at most 16 ranks."""
    for pp, vpp, dp, ep in itertools.product((1, 2, 4, 8, 16), (1, 2, 3, 4), (1, 2, 4), (1, 2, 4)):
        if pp * dp <= 16 and dp % ep == 0 and (pp > 1 or vpp == 1):
            num_layers = next(depth for depth in (5, 16, 32, DEEPEST) if depth >= pp * vpp)
            yield Case({"pp": pp, "vpp": vpp, "ep": ep, "dp": dp}, num_layers)


def worst_difference(found: Losses, expected: Losses) -> float:
    """Largest relative difference of any loss or gradient norm."""
    pairs = zip(sum(found, ()), sum(expected, ()), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def assert_first_loss_agrees(found: Losses, expected: Losses) -> None:
    """Before any update a decoupled tower gives the loss of a coupled one but for float32's rounding."""
    assert abs(found[0][0] / expected[0][0] - 1) <= FIRST_LOSS_TOLERANCE, "the first loss differs"

"""Muon on flat shards; each matrix is orthogonalised whole, by one owner (Moonlight, arXiv 2502.16982, 2.3).

K2 report, algorithm 1: M <- mu M + G; O <- NS(M) * sqrt(max(rows, cols)) * 0.2; W <- W - lr (O + decay W).
With Nesterov's momentum, as in Moonlight's code, NS(G + mu M).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
from emerging_optimizers.utils import fp32_matmul_precision
from torch import Tensor, nn

from k25_train.config.basics import DType
from k25_train.config.optimizer import MuonConfig
from k25_train.parameters.update_rules import ParameterRule
from k25_train.units import MIB
from parallel.host.state_stream import Loaded
from parallel.megatron.sharded_optimizer import ParameterShard, ShardedOptimizer
from parallel.megatron.state_store import ParamGroups, StateStore
from parallel.muon.exchange import MatrixExchange
from parallel.muon.plan import Matrix, cut, plan_owners, plan_rounds
from parallel.norms import frobenius_norms

STATE_KEYS = ("exp_avg",)
"""The momentum, named as checkpoints of megatron-core name a first moment."""
SMALLEST_NORM = 1e-7
"""What the norm of a smaller matrix is taken to be, so that one of zeros remains so."""


class Segment(NamedTuple):
    """This rank's piece of a matrix."""

    master: Tensor
    """The flat float32 shard that holds it."""
    start: int
    """Offset in the shard, in elements."""
    size: int
    """Number of elements."""
    group: int
    """Index of the shard's parameter group."""

    def of(self, shard: Tensor) -> Tensor:
        """The piece [size] of a tensor of the shard's shape."""
        return shard[self.start : self.start + self.size]


class Muon(torch.optim.Optimizer):
    """Momentum on this rank's shards, orthogonalisation by the matrices' owners, decoupled weight decay.

    State of a shard [N]: `exp_avg` [N] float32, the momentum M, and `step`. It is built on flat shards;
    `bind` sets which matrices they are pieces of. The store says where the shards and their state rest; the
    arithmetic is on the device in any case, round by round of the exchange.
    """

    def __init__(self, groups: ParamGroups, store: StateStore, settings: MuonConfig) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.store = store
        self.settings = settings
        self._exchange: MatrixExchange | None = None
        self._segments: list[Segment | None] = []

    def bind(self, exchange: MatrixExchange, segments: list[Segment | None]) -> None:
        """Set which matrices the shards are pieces of: [number of the matrix] -> this rank's piece."""
        self._exchange = exchange
        self._segments = segments

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every shard in place. Called by every rank of the group."""
        assert closure is None, "gradients are ready when the optimizer steps"
        assert self._exchange is not None, "bind comes first"
        for group in self.param_groups:
            for master in group["params"]:
                state = self.state[master]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(master)
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                state["step"] += 1
        pieces = _StepOfPieces(self, self._segments, self._exchange.most_held)
        self._exchange.run(pieces, self._orthogonalize)
        pieces.close()

    def _orthogonalize(self, matrices: Tensor) -> Tensor:
        """The updates of matrices [B, rows, cols], without the learning rate; overwrites the matrices."""
        settings = self.settings
        # Newton-Schulz divides by norms that are 4e-3 too small for 50M elements on the CPU. Of matrices of
        # norm 1 it takes the norm to be `eps`: at least 1.
        matrices.div_(frobenius_norms(matrices).clamp_min(SMALLEST_NORM).float())
        precision = "highest" if settings.newton_schulz_dtype is DType.float32 else "medium"
        with fp32_matmul_precision(precision):
            updates = newton_schulz(
                matrices,
                steps=settings.newton_schulz_steps,
                coefficient_type=settings.newton_schulz_coefficients.value,
                eps=1.0,
            )
        return updates * (settings.update_rms * max(matrices.shape[-2:]) ** 0.5)


class _StepOfPieces:
    """One step of this rank's pieces of matrices, in the rounds of the exchange.

    Momentum goes through one lane and masters through another: a round's masters come when its momentum is
    gone, since its matrices are orthogonalised in between.
    """

    def __init__(self, muon: Muon, segments: Sequence[Segment | None], most_elements: int) -> None:
        """`most_elements` are the most that this rank has of the matrices of one round."""
        self._muon, self._segments = muon, segments
        self._momenta, self._masters = (muon.store.lane(most_elements) for _ in range(2))
        self._directions: Loaded | None = None
        self._targets: deque[Loaded] = deque()

    def load_directions(self, matrices: Sequence[int]) -> None:
        """Start loading momentum."""
        held = self._held(matrices)
        self._directions = self._momenta.load(
            [segment.of(self._muon.state[segment.master]["exp_avg"]) for segment in held]
        )

    def directions(self, matrices: Sequence[int]) -> list[Tensor]:
        """What is orthogonalised: M <- mu M + G, or G + mu M with Nesterov's momentum."""
        assert self._directions is not None
        decay, found = self._muon.settings.momentum, []
        for segment, momentum in zip(self._held(matrices), self._directions.tensors(), strict=True):
            gradient = segment.of(self._muon.store.gradient(segment.master))
            momentum.mul_(decay).add_(gradient)
            found.append(gradient + decay * momentum if self._muon.settings.nesterov else momentum)
        self._directions.write_back()
        return found

    def load_targets(self, matrices: Sequence[int]) -> None:
        """Start loading masters."""
        held = self._held(matrices)
        self._targets.append(self._masters.load([segment.of(segment.master) for segment in held]))

    def apply(self, matrices: Sequence[int], updates: Sequence[Tensor]) -> None:
        """W <- W - lr (O + decay W)."""
        targets = self._targets.popleft()
        held = self._held(matrices)
        for segment, master, update in zip(held, targets.tensors(), updates, strict=True):
            group = self._muon.param_groups[segment.group]
            master.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
            self._muon.store.finish(segment.master, segment.start, master)
        targets.write_back()

    def close(self) -> None:
        """Free the lanes' buffers."""
        self._momenta.close()
        self._masters.close()

    def _held(self, matrices: Sequence[int]) -> list[Segment]:
        found = [self._segments[matrix] for matrix in matrices]
        held = [segment for segment in found if segment is not None]
        assert len(held) == len(found), "the plan gives this rank a piece that it lacks"
        return held


def bind_matrices(
    optimizer: ShardedOptimizer,
    rules: Mapping[nn.Parameter, ParameterRule],
    group: dist.ProcessGroup,
    device: torch.device,
    busy: Sequence[int],
) -> list[int]:
    """Set which matrices a Muon optimizer's shards are pieces of, and plan which rank owns which.

    Args:
        rules: the update rule of each parameter.
        group: ranks that owners are chosen from: all data-parallel ranks, for experts' matrices too, since
            their own replicas alone could not make up for a large dense matrix.
        device: the device to compute updates on.
        busy: [rank in the group] -> Newton-Schulz FLOPs per step that it already has; empty means none.

    Returns the FLOPs per step that each rank of the group ends up with.
    """
    inner = optimizer.optimizer
    assert isinstance(inner, Muon)
    num_shards = optimizer.data_parallel_group.size()
    # 1. Experts: every ep-th rank has the same ones; the others have as many of the same shapes.
    num_sets = group.size() // num_shards
    own_set = group.rank() % num_sets
    shards = optimizer.shards()
    matrices: list[Matrix] = []
    segments: list[Segment | None] = []
    # 2. Every matrix, with the ranks that hold its pieces and this rank's piece of it.
    for buffer in optimizer.buffers:
        for parameter, (start, _, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            shard_size = bucket.grad_data.numel() // num_shards
            rows, cols = matrix_shape(parameter.shape, rules[parameter].num_matrices)
            held = shards.get(parameter)
            for first in range(0, parameter.numel(), rows * cols):
                pieces = cut(start - bucket.offset + first, rows * cols, shard_size)
                own = _segment(held, first, rows * cols)
                for number_of_set in range(num_sets):
                    ranks = tuple((shard * num_sets + number_of_set, size) for shard, size in pieces)
                    matrices.append(Matrix(rows, cols, ranks))
                    segments.append(own if number_of_set == own_set else None)
    # 3. Owners and rounds, the same on every rank.
    settings = inner.settings
    owners, work = plan_owners(matrices, group.size(), settings.newton_schulz_steps, busy)
    wire_dtype = torch.float32 if settings.exchange_dtype is DType.float32 else torch.bfloat16
    most = settings.exchange_mib * MIB // 4
    rounds = list(plan_rounds(matrices, owners, group.size(), most))
    inner.bind(MatrixExchange(matrices, rounds, group, wire_dtype=wire_dtype, device=device), segments)
    return work


def matrix_shape(shape: torch.Size, num_matrices: int) -> tuple[int, int]:
    """Rows and columns of each of the equal blocks of rows that a parameter is made of.

    Stacked matrices are [E, rows, cols]; a convolution [out, in, h, w] is the matrix [out, in * h * w].
    """
    rows = shape[0] * shape[1] if len(shape) == 3 else shape[0]
    return rows // num_matrices, shape.numel() // rows


def _segment(shard: ParameterShard | None, first: int, size: int) -> Segment | None:
    """This rank's piece of the elements [first, first + size) of a parameter, of which it has `shard`."""
    if shard is None:
        return None
    start, stop = max(first - shard.start, 0), min(first + size, shard.end) - shard.start
    return Segment(shard.master, start, stop - start, shard.group) if stop > start else None

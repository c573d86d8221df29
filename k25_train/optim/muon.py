"""Muon on flat shards; each matrix is orthogonalised whole, by one owner (Moonlight, arXiv 2502.16982, 2.3).

K2 report, algorithm 1: M <- mu M + G; O <- NS(M) * sqrt(max(rows, cols)) * 0.2; W <- W - lr (O + decay W).
With Nesterov's momentum, as in Moonlight's code, NS(G + mu M).
"""

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
from parallel.megatron.sharded_optimizer import ParameterShard, ParamGroups, ShardedOptimizer
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


class Muon(torch.optim.Optimizer):
    """Momentum on this rank's shards, orthogonalisation by the matrices' owners, decoupled weight decay.

    State of a shard [N]: `exp_avg` [N] float32, the momentum M, and `step`. It is built on flat shards;
    `bind` sets which matrices they are pieces of.
    """

    def __init__(self, groups: ParamGroups, settings: MuonConfig) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.settings = settings
        self._exchange: MatrixExchange | None = None
        self._segments: list[Segment | None] = []

    def bind(self, exchange: MatrixExchange, segments: list[Segment | None]) -> None:
        """Set which matrices the shards are pieces of: [number of the matrix] -> this rank's piece."""
        self._exchange = exchange
        self._segments = segments

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a state, without step counts in parameter groups: Muon counts in its state.

        Transformer Engine's Adam counts in its groups. In a group of Muon's, such a count would fall behind,
        and megatron-core saves nothing when the counts of groups differ.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.pop("step", None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every shard in place. Called by every rank of the group."""
        assert closure is None, "gradients are ready when the optimizer steps"
        assert self._exchange is not None, "bind comes first"
        # 1. Momentum and weight decay of this rank's shards.
        for group in self.param_groups:
            for master in group["params"]:
                self._accumulate(master)
                master.mul_(1 - group["lr"] * group["weight_decay"])
        # 2. Owners orthogonalise whole matrices; every rank applies the updates of its pieces.
        pieces = [None if segment is None else self._direction(segment) for segment in self._segments]
        self._exchange.run(pieces, self._orthogonalize, self._apply)

    def _accumulate(self, master: Tensor) -> None:
        """M <- mu M + G of a shard."""
        state = self.state[master]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(master)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        state["exp_avg"].mul_(self.settings.momentum).add_(master.grad)

    def _direction(self, segment: Segment) -> Tensor:
        """What is orthogonalised of a piece: M, or G + mu M with Nesterov's momentum."""
        own = slice(segment.start, segment.start + segment.size)
        momentum = self.state[segment.master]["exp_avg"][own]
        if not self.settings.nesterov:
            return momentum
        assert segment.master.grad is not None
        return segment.master.grad[own] + self.settings.momentum * momentum

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

    def _apply(self, number: int, update: Tensor) -> None:
        """Subtract a piece's update from its shard."""
        segment = self._segments[number]
        assert segment is not None
        own = segment.master[segment.start : segment.start + segment.size]
        own.add_(update.to(own.device), alpha=-self.param_groups[segment.group]["lr"])


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

"""What every objective takes and returns: plain tensors of one micro-batch, without ranks or a run.

The last pipeline stage calls the objective for each micro-batch. megatron-core sends `loss` backward and
divides the gradient by the sum of `num_tokens` over the global batch; `sums` are added up over micro-batches
and ranks.

Shapes: T tokens of a micro-batch, S sums.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class PolicyTargets(NamedTuple):
    """What reinforcement learning knows of each label; nothing is known, [0], in next-token prediction.

    As of a label, an entry is where the token is that predicts it. The weights have all normalisation in
    them: of the tokens of a prompt's responses, of prompts, and the step's number of tokens, by which
    megatron-core divides. Zero where a token was not generated.
    """

    rollout_logprobs: Tensor
    """[T] float32, log-probability of the label when it was drawn."""
    advantages: Tensor
    """[T] float32, reward of its response less the mean of its group."""
    policy_weights: Tensor
    """[T] float32, weight of the term with the advantage."""
    ratio_weights: Tensor
    """[T] float32, weight of the penalty on the ratio."""
    ptx_weights: Tensor
    """[T] float32, weight of the next-token loss."""
    responses: Tensor
    """[T] int64, number of the trajectory in the step, a response or a branch of one; -1 where there is
    none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Which tokens of a micro-batch count, and as what."""

    loss_mask: Tensor
    """[T] float32, 0 or 1."""
    source: Tensor
    """[T] int64, index into the objective's sources of tokens."""
    policy: PolicyTargets
    """What is known of labels that a policy has generated."""


class ObjectiveOutput(NamedTuple):
    """What an objective makes of one micro-batch."""

    loss: Tensor
    """Scalar, a sum over tokens: what goes backward."""
    num_tokens: Tensor
    """Scalar int32: what the gradient is divided by, once summed over the global batch."""
    sums: Tensor
    """[S] float64 without a graph, in the order of `Objective.sum_names`."""


class Objective(Protocol):
    """A way to score tokens, and to report the scores; `next_token.NextToken` is one."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Name of each reported sum, the same on every rank and in every micro-batch."""

    def loss(self, sums: "NamedSums") -> float:
        """The figure of a step that is reported as its loss."""

    def figures(self, sums: "NamedSums") -> dict[str, float]:
        """Everything that an evaluation reports, by name."""

    def __call__(self, token_losses: Tensor, targets: Targets) -> ObjectiveOutput:
        """Score a micro-batch.

        Args:
            token_losses: [T], or [1, T], float: negative log-likelihood of each label in nats.
            targets: which of them count.
        """


@dataclass(frozen=True, slots=True)
class NamedSums:
    """Sums over tokens by name, of any number of micro-batches."""

    values: Mapping[str, float]
    """Name, one of `Objective.sum_names` -> sum."""

    @classmethod
    def of(cls, names: Iterable[str], sums: Tensor) -> "NamedSums":
        """Name the entries of `sums` [S]."""
        return cls(dict(zip(names, sums.tolist(), strict=True)))

    def __getitem__(self, name: str) -> float:
        return self.values[name]


def total(outputs: Iterable[Tensor], num_sums: int, device: torch.device) -> Tensor:
    """Add up what micro-batches report, [S] each; zeros on a rank that reports nothing."""
    added = torch.zeros(num_sums, dtype=torch.float64, device=device)
    for sums in outputs:
        added += sums
    return added


def no_policy(device: torch.device) -> PolicyTargets:
    """What next-token prediction knows of a policy: nothing."""
    nothing = torch.zeros(0, device=device)
    return PolicyTargets(nothing, nothing, nothing, nothing, nothing, nothing.long())

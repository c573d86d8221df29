"""Reinforcement learning of a policy on tokens that it has drawn, by K2.5's equation (report, equation 1).

    ρ      probability of a drawn token now / when it was drawn, as the engine recorded it
    loss = Σ w_policy · -clip(ρ, α, β) · A  +  Σ w_ratio · τ · (log ρ)²  +  Σ w_ptx · -log p

The clip is a mask: a token whose ρ lies outside of [α, β] has no gradient from its advantage A, whatever the
advantage's sign; PPO's minimum would let through half of them. The penalty is masked nowhere: it is what
brings such a token back. The report calls its equation a loss and signs it as what is maximised, and speaks
of a log-ratio where it clips ratios: here the loss is minimised, and α and β bound ρ.

All weights come with the tokens (`PolicyTargets`): the 1/N of the equation, the mean over prompts, and the
step's number of tokens, by which megatron-core divides.

Shapes: T tokens of a micro-batch, J trajectories in it.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from k25_train.objectives.base import NamedSums, ObjectiveOutput, Targets
from k25_train.objectives.next_token import NextToken

_LOWEST_EDGE, _HIGHEST_EDGE = -7, 2
GAP_EDGES = tuple(10.0 ** (half / 2) for half in range(2 * _LOWEST_EDGE, 2 * _HIGHEST_EDGE + 1))
"""Edges of the buckets of |log ρ| in nats, two a decade from 1e-7 to 100."""
_TERMS = ("loss", "tokens", "trained", "below", "above", "ratio", "log_ratio", "gap", "square")
"""Sums over tokens of the policy, before those of buckets."""


class PolicyGradient:
    """K2.5's objective, or that of K1.5 and K2 with the log-ratio of whole responses (`is_sequence`).

    With L the sum of log ρ over a response, that is w · (-A · L + τ/2 · L²): up to what has no gradient and
    a factor of 2τ, (A - τ · L)² (K1.5 report, section 2.3.2), which masks nothing. A branch counts as a
    response of its own. Its tokens have to be on one rank. How responses are normalised is the same in both.
    """

    def __init__(
        self,
        sources: Iterable[str],
        with_media: Collection[str],
        *,
        ratio_low: float,
        ratio_high: float,
        ratio_penalty: float,
        is_sequence: bool,
    ) -> None:
        """
        Args:
            sources, with_media: as of `NextToken`, which reports what has a next-token loss.
            ratio_low: α.
            ratio_high: β.
            ratio_penalty: τ.
            is_sequence: whether ratios are those of whole responses.
        """
        self.next_token = NextToken(sources, with_media)
        self._low, self._high = math.log(ratio_low), math.log(ratio_high)
        self._penalty = ratio_penalty
        self._is_sequence = is_sequence

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Of tokens of the policy, then of next-token losses by source."""
        buckets = [f"gap_from/{edge:.3g}" for edge in GAP_EDGES]
        own = [f"policy/{name}" for name in (*_TERMS, *buckets)]
        return (*own, *self.next_token.sum_names)

    def __call__(self, token_losses: Tensor, targets: Targets) -> ObjectiveOutput:
        """Score a micro-batch; see `Objective`. `targets.loss_mask` has every drawn token, those without a
        weight included, and every other one with a next-token loss."""
        losses, policy = token_losses.float().flatten(), targets.policy
        # 1. log ρ of what was drawn, 0 elsewhere.
        is_drawn = (policy.responses >= 0) & (targets.loss_mask > 0)
        log_ratio = torch.where(is_drawn, -losses - policy.rollout_logprobs, 0.0)

        # 2. The policy's terms, and the next-token loss. A label that no longer counts has no loss.
        terms = self._of_responses if self._is_sequence else self._of_tokens
        ptx = policy.ptx_weights * targets.loss_mask
        loss = terms(log_ratio, targets) + (ptx * torch.where(ptx > 0, losses, 0.0)).sum()

        # 3. What is reported.
        num_tokens = targets.loss_mask.sum().to(torch.int)
        counted = replace(targets, loss_mask=(ptx > 0).float())
        of_sources = self.next_token(losses.detach(), counted).sums
        own = self._sums(loss.detach(), log_ratio.detach(), is_drawn, targets)
        return ObjectiveOutput(loss, num_tokens, torch.cat([own, of_sources]))

    def _of_tokens(self, log_ratio: Tensor, targets: Targets) -> Tensor:
        policy, mask = targets.policy, targets.loss_mask
        # The same as clipping ρ, but exp of what is clipped cannot overflow, whose gradient would be 0 · inf.
        clipped = log_ratio.clamp(self._low, self._high).exp()
        gained = (policy.policy_weights * mask * policy.advantages * clipped).sum()
        return self._penalty * (policy.ratio_weights * mask * log_ratio.square()).sum() - gained

    def _of_responses(self, log_ratio: Tensor, targets: Targets) -> Tensor:
        # 1. Tokens of each trajectory [J]; all others go to one more, which has no weight. On CUDA the host
        #    waits for their number.
        policy, mask = targets.policy, targets.loss_mask
        _, numbers = torch.unique(policy.responses, return_inverse=True)
        num_responses = int(numbers.max()) + 1 if len(numbers) else 0
        is_trained, is_held = policy.policy_weights * mask > 0, policy.ratio_weights * mask > 0

        def summed(values: Tensor) -> Tensor:
            # A product of matrices adds in the same order in every run.
            return (numbers == torch.arange(num_responses, device=numbers.device)[:, None]).float() @ values

        def mean(values: Tensor, among: Tensor) -> Tensor:
            return summed(values * among) / summed(among.float()).clamp(min=1)

        # 2. -A · L over what is trained, τ/2 · L² over what is held to its rollout.
        gained = mean(policy.policy_weights * policy.advantages, is_trained) * summed(log_ratio * is_trained)
        square = summed(log_ratio * is_held).square()
        return (0.5 * self._penalty * mean(policy.ratio_weights, is_held) * square - gained).sum()

    def _sums(self, loss: Tensor, log_ratio: Tensor, is_drawn: Tensor, targets: Targets) -> Tensor:
        """What the rewards have no part in but for the loss: [len(_TERMS) + len(GAP_EDGES)] float64."""
        is_trained = is_drawn & (targets.policy.policy_weights > 0)
        gap = log_ratio.abs().double()
        # Made on the device: a copy from the host would wait for it.
        edges = torch.logspace(
            _LOWEST_EDGE, _HIGHEST_EDGE, len(GAP_EDGES), dtype=torch.float64, device=gap.device
        )
        # A ratio of e^20 stands for all larger ones: one token would hide all others in the mean.
        values = torch.stack(
            [
                is_drawn.double(),
                is_trained.double(),
                (is_trained & (log_ratio < self._low)).double(),
                (is_trained & (log_ratio > self._high)).double(),
                is_drawn * log_ratio.double().clamp(max=20.0).exp(),
                log_ratio.double(),
                gap,
                gap.square(),
            ]
        )
        buckets = (gap >= edges[:, None]) & is_drawn
        return torch.cat([loss.double().view(1), values.sum(dim=1), buckets.double().sum(dim=1)])

    def loss(self, sums: NamedSums) -> float:
        """What was minimised, per token with a loss."""
        count = sums["policy/tokens"] + sum(sums[f"tokens/{name}"] for name in self.next_token.sources)
        return sums["policy/loss"] / max(count, 1)

    def figures(self, sums: NamedSums) -> dict[str, float]:
        """`policy/…` where there are tokens of the policy, and those of `NextToken` where there are others.

        `mask_share`, `below_share` and `above_share`: of the trained tokens those whose ratio lies outside
        of the interval, below and above it. `ratio`: mean of ρ. `log_ratio`, `log_ratio_square`: means of
        log ρ and its square. `gap`: mean of |log ρ|, which in a first step on fresh rollouts is what engine
        and trainer disagree by. `gap_p50`, `gap_p99`, `gap_p999`, `gap_max`: upper bounds of its quantiles
        and of all of it, by the edges of the buckets (10 times the last edge if it is above all of them).
        """
        found = self.next_token.figures(sums)
        count, trained = sums["policy/tokens"], sums["policy/trained"]
        if not count:
            return found
        below, above = (sums[f"policy/{name}"] / max(trained, 1) for name in ("below", "above"))
        quantiles = {"gap_p50": 0.5, "gap_p99": 0.99, "gap_p999": 0.999, "gap_max": 1.0}
        return {
            **found,
            "policy/mask_share": below + above,
            "policy/below_share": below,
            "policy/above_share": above,
            "policy/ratio": sums["policy/ratio"] / count,
            "policy/log_ratio": sums["policy/log_ratio"] / count,
            "policy/log_ratio_square": sums["policy/square"] / count,
            "policy/gap": sums["policy/gap"] / count,
            **{f"policy/{name}": _quantile(sums, share) for name, share in quantiles.items()},
        }


def _quantile(sums: NamedSums, share: float) -> float:
    """The lowest edge below which at least that share of the tokens is."""
    most = (1 - share) * sums["policy/tokens"]
    for edge in GAP_EDGES:
        if sums[f"policy/gap_from/{edge:.3g}"] <= most:
            return edge
    return 10 * GAP_EDGES[-1]

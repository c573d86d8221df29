"""How a policy is trained by reinforcement: K2.5's objective, its variants for comparison, and Toggle.

Sources are abbreviated as in `config/model.py`. K2.5 discloses none of the values (equation 1 and section 4.4
name them), so each is our choice.
"""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import not_negative
from parallel.config import Problem, not_positive


class PolicyForm(Enum):
    """Which objective it is (`k25_train/objectives/policy_gradient.py`)."""

    token = "token"
    """K2.5, equation 1: the ratio of each token masks its own gradient, and its squared log is penalised."""
    sequence = "sequence"
    """K1.5 and K2: (reward - mean - penalty · log-ratio of the response)², without a mask."""


class OtherVersions(Enum):
    """What becomes of tokens that were not made by the weights that the step begins with."""

    train = "train"
    """They are trained like all others."""
    mask = "mask"
    """They have no loss."""
    ratio_only = "ratio_only"
    """They have the penalty on their ratio alone."""


@dataclass(slots=True, kw_only=True)
class ToggleConfig:
    """Alternating phases, with and without a budget of tokens. Source: K2.5, section 4.4 (Toggle)."""

    enabled: bool
    """Whether there are phases; without, rewards are never held against a budget."""
    interval: int
    """Steps of a phase, m in the report. Source: not disclosed, our choice."""
    accuracy: float
    """Mean accuracy of a prompt's responses from which on its budget counts, λ in the report."""
    percentile: float
    """Percentile, 0 to 1, of the lengths of correct responses that is the budget, ρ in the report."""
    samples: int
    """Responses to each problem from which budgets are estimated, before the first step."""
    min_correct: int
    """Fewest correct responses of a problem for a budget; with fewer it has none."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("interval", "samples", "min_correct"))
        for name in ("accuracy", "percentile"):
            if not 0 <= getattr(self, name) <= 1:
                rule = "must be between 0 and 1"
                found.append(Problem(name, getattr(self, name), rule, "e.g. 0.25"))
        return found


@dataclass(slots=True, kw_only=True)
class AlgorithmConfig:
    """What a step of reinforcement learning trains on, and for what."""

    prompts_per_step: int
    """Groups of one optimizer step."""
    group_size: int
    """Responses to one prompt, K in the report."""
    form: PolicyForm
    """Which objective."""
    ratio_low: float
    """Ratio below which a token has no gradient from its reward, α in the report."""
    ratio_high: float
    """Ratio above which it has none, β in the report."""
    ratio_penalty: float
    """Weight of the squared log-ratio, τ in the report."""
    normalize_advantages: bool
    """Whether advantages are divided by the standard deviation of the group's rewards, as GRPO does; K2.5
    does not."""
    skip_equal_rewards: bool
    """Whether groups whose responses all earned the same are left out of the step: they have no advantage,
    and their penalty alone is left. Source: our choice."""
    other_versions: OtherVersions
    """What becomes of tokens of earlier weights, which partial rollouts and asynchronous steps have."""
    ptx_coeff: float
    """Weight of the next-token loss on sequences of `data` in every step, K2's PTX loss; 0 for none."""
    ptx_sequences: int
    """Sequences of `data` in every step, where `ptx_coeff` is above 0."""
    steps_per_rollout: int
    """Optimizer steps on the groups of one rollout phase, which are divided among them; weights are pushed
    after the last one."""
    max_staleness: int
    """Versions by which the weights that make a token may be behind the step that trains it; 0 for
    synchronous phases as in K2.5, more for rollouts that go on during training."""
    token_cap: int | None
    """Tokens that a response may get in one rollout phase; it goes on in the next one (partial rollouts of
    K1.5). Where too few groups are complete by then, all of them get as many again. null for none."""
    toggle: ToggleConfig
    """Alternating phases with a budget."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        sizes = (
            "prompts_per_step",
            "group_size",
            "ptx_sequences",
            "steps_per_rollout",
            "ratio_low",
            "ratio_high",
        )
        found = not_positive(self, sizes)
        found += not_negative(self, ("ratio_penalty", "ptx_coeff", "max_staleness"))
        found += [problem.under("toggle") for problem in self.toggle.problems()]
        if self.ratio_low > 1 or self.ratio_high < 1:
            rule = f"must hold 1: equal policies train, but it is {self.ratio_low} to {self.ratio_high}"
            found.append(Problem("ratio_low", self.ratio_low, rule, "use e.g. 0.5 and 2.0"))
        if self.group_size == 1:
            rule = "must be 2 or more: an advantage is the difference to the group's mean"
            found.append(Problem("group_size", 1, rule, "e.g. 16"))
        if self.token_cap is not None and self.token_cap <= 0:
            found.append(
                Problem("token_cap", self.token_cap, "must be positive", "use more, or null for none")
            )
        return found

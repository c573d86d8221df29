"""The optimizer's configuration sections; sources are abbreviated as in `config/model.py`."""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import DType, not_negative
from k25_train.config.parts import ModelPart
from k25_train.config.span import SpanText, not_spans
from k25_train.config.vision import TOWER, VisionPart
from parallel.config import Problem, not_positive


class OptimName(Enum):
    """Update rules."""

    adamw = "adamw"
    """AdamW for every parameter."""
    muonclip = "muonclip"
    """Muon for matrices, AdamW for the rest (see `k25_train/parameters/update_rules.py`)."""


class OptimizerOffload(Enum):
    """Where optimizer state rests between steps."""

    none = "none"
    """On the device."""
    cpu = "cpu"
    """In page-locked host memory; it passes through the device in each step."""


class NewtonSchulzCoefficients(Enum):
    """Polynomials of the Newton-Schulz iteration, by their names in emerging-optimizers."""

    simple = "simple"
    """One polynomial for every step: 3.4445, -4.7750, 2.0315 (Moonlight, section 2.1)."""
    quintic = "quintic"
    """Five polynomials in turn, by L. Cesista."""
    polar_express = "polar_express"
    """Eight polynomials, the last one repeated (arXiv 2505.16932)."""
    cans = "cans"
    """Five polynomials, the last one repeated (arXiv 2506.10935)."""
    aol = "aol"
    """Four polynomials in turn, of the flash-newton-schulz project."""
    deepseekv4 = "deepseekv4"
    """Eight steps of `simple`, then two or more of a polynomial that converges (DeepSeek V4 report)."""


@dataclass(slots=True, kw_only=True)
class MuonConfig:
    """Muon: M = momentum·M + G, O = NewtonSchulz(M), W = W - lr·(update_rms·√max(rows, columns)·O + decay·W)
    (K2, algorithm 1); with `nesterov` O = NewtonSchulz(G + momentum·M)."""

    momentum: float
    """Decay of the momentum per step. Source: Moonlight's code; not disclosed for K2."""
    nesterov: bool
    """Whether G + momentum·M is orthogonalised instead of M. Source: K2, algorithm 1, has the plain form;
    Moonlight's code has Nesterov's."""
    newton_schulz_steps: int
    """Steps of the iteration that makes a matrix orthogonal. Source: Moonlight, section 2.1: ten are no
    better than five."""
    newton_schulz_coefficients: NewtonSchulzCoefficients
    """Polynomials of the iteration. Source: Moonlight, section 2.1; not disclosed for K2."""
    newton_schulz_dtype: DType
    """Format of the iteration's matrix products, TF32 off. Source: bfloat16 in Moonlight's code, which is
    about 1% off; not disclosed for K2."""
    exchange_dtype: DType
    """Format in which momentum goes to a matrix's owner and its orthogonal form comes back. Source: bfloat16
    in Moonlight, section 2.3; not disclosed for K2."""
    update_rms: float
    """Root mean square of an update before the learning rate, which lets AdamW's rate and decay serve Muon.
    Source: Moonlight, section 2.2, and K2, algorithm 1."""
    per_head: bool
    """Whether each head's rows of the query's and of the key-value up-projection are a separate matrix.
    Source: whole projections in Moonlight, where heads alone gave too large updates; the Kimi K3 report
    (arXiv 2607.24653) has heads."""
    exchange_mib: int
    """Maximum MiB that a rank sends or receives in one round of the exchange. Source: not disclosed, our
    choice."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("newton_schulz_steps", "update_rms", "exchange_mib"))
        if not 0 <= self.momentum < 1:
            found.append(Problem("momentum", self.momentum, "must lie in [0, 1)", "the usual value is 0.95"))
        return found


@dataclass(slots=True, kw_only=True)
class PartOptimConfig:
    """How one part of the model is updated; everything else is as for the others."""

    name: OptimName
    """Update rule. Source: MuonClip for the language model in K2, section 2.5; Muon for tower and projector
    in Kimi-VL (arXiv 2504.07491); K2.5, section 4.5.1, lets them differ and does not disclose how."""
    trained: bool
    """Whether its weights are updated. What is not has neither gradients nor optimizer state, nor do its
    router biases move. Source: all parts in K2.5's joint training, the projector alone before it (section
    4.3)."""
    lr_scale: float
    """Learning rate as a multiple of `optim.lr`. Source: not disclosed, our choice."""
    grad_clip: float | None
    """Largest gradient norm of the part, to which its gradients are scaled before all of them are to
    `optim.grad_clip`; null for no limit of its own. Source: the Kimi K3 report (arXiv 2607.24653) has towers
    whose gradients spike; whether it limits them is not disclosed, our choice."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        limits = ("grad_clip",) if self.grad_clip is not None else ()
        return not_positive(self, ("lr_scale", *limits))


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """Update rules and the warm-up, constant, cosine-decay schedule of the learning rate (WSD)."""

    language_model: PartOptimConfig
    """Update of embedding, decoder layers and head."""
    vision_tower: PartOptimConfig
    """Update of the vision tower."""
    mm_projector: PartOptimConfig
    """Update of the projector."""
    lr: float
    """Learning rate between warm-up and decay, of Muon and AdamW alike. Source: 2e-4 in K2, section 2.5."""
    start_lr: float
    """Learning rate from which warm-up rises: 0, or where the stage before ended. Source: not disclosed, our
    choice."""
    min_lr: float
    """Learning rate at the end of the decay. Source: 2e-5 in K2, section 2.5."""
    beta1: float
    """AdamW's decay of the first moment per step. Source: Moonlight's code."""
    beta2: float
    """AdamW's decay of the second moment per step. Source: Moonlight's code."""
    eps: float
    """Constant that AdamW adds to the root of the second moment. Source: Moonlight's code."""
    weight_decay: float
    """Decoupled decay, multiplied by the learning rate. Source: 0.1 in K2, section 2.5."""
    grad_clip: float
    """Largest global gradient norm. Source: not disclosed, our choice."""
    warmup: SpanText
    """Steps or tokens of linear warm-up. Source: 500 steps in K2, section 2.5."""
    decay: SpanText
    """Last steps or tokens of the run, in which the rate falls along a cosine. Source: 5.5T tokens in K2,
    section 2.5."""
    frozen_expert_bias: SpanText
    """Last steps or tokens of the run, in which the routers' expert biases stay as they are; 0 for none.
    Source: update rate 0 in the cool-down of Moonlight (arXiv 2502.16982, appendix C); not disclosed for K2
    and K2.5."""
    offload: OptimizerOffload
    """Where optimizer state and float32 masters are kept. Source: not disclosed, our choice."""
    qk_clip_threshold: float | None
    """Largest attention logit of a head (the softmax's input) above which QK-Clip scales the head's query and
    key weights down after the update; null is off. Source: 100 in K2, section 2.1."""
    qk_clip_interval: int
    """Steps from one in which largest logits are taken and heads clipped to the next, counted from the first;
    with 1 every step. In between nothing is clipped: logits of another step would clip what the last clip has
    cured, or miss what has grown since. Source: 1 in K2, section 2.1."""
    max_skipped_steps: int
    """Consecutive steps with non-finite gradients that are skipped; one more stops the run. Source: not
    disclosed, our choice."""
    muon: MuonConfig
    """Muon's own settings."""

    def of(self, part: ModelPart) -> PartOptimConfig:
        """How that part is updated."""
        return {
            ModelPart.language_model: self.language_model,
            ModelPart.vision_tower: self.vision_tower,
            ModelPart.mm_projector: self.mm_projector,
        }[part]

    @property
    def trained(self) -> frozenset[ModelPart]:
        """The parts whose weights are updated."""
        return frozenset(part for part in ModelPart if self.of(part).trained)

    @property
    def trained_vision(self) -> frozenset[VisionPart]:
        """Those of vision."""
        return frozenset(part for part in VisionPart if self.of(ModelPart(part.value)).trained)

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken, those of its sub-sections included."""
        found = not_positive(self, ("lr", "eps", "grad_clip", "qk_clip_interval"))
        found += not_negative(self, ("start_lr", "min_lr", "weight_decay", "max_skipped_steps"))
        found += not_spans(self, ("warmup", "decay", "frozen_expert_bias"))
        for name in ("start_lr", "min_lr"):
            rate = getattr(self, name)
            if rate > self.lr:
                rule = f"must not exceed lr ({self.lr})"
                found.append(Problem(name, rate, rule, f"lower {name} or raise lr"))
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            if not 0 <= beta < 1:
                found.append(Problem(name, beta, "must lie in [0, 1)", "usual values are 0.9 and 0.95"))
        if self.qk_clip_threshold is not None:
            found += not_positive(self, ("qk_clip_threshold",))
        found += [problem.under("muon") for problem in self.muon.problems()]
        for part in ModelPart:
            found += [problem.under(part.value) for problem in self.of(part).problems()]
        return found + self._untrained()

    def _untrained(self) -> list[Problem]:
        """Something is trained, and no tower behind a projector that is not."""
        if not self.trained:
            rule = "leaves nothing to train: no part of the model is"
            remedy = "use true, or true for optim.vision_tower or optim.mm_projector"
            return [Problem("language_model.trained", False, rule, remedy)]
        if self.trained_vision == TOWER:
            rule = "is not possible behind a projector that is not trained"
            remedy = "use optim.mm_projector.trained=true, or false for both"
            return [Problem("vision_tower.trained", True, rule, remedy)]
        return []

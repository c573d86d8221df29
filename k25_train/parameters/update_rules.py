"""The rule by which each parameter is updated, from the table of parameters; torch-free.

A name that the table lacks is an error.
"""

from dataclasses import dataclass
from math import prod

from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimConfig, OptimName
from k25_train.config.parts import ModelPart
from k25_train.parameters import table
from k25_train.parameters.entry import Kind, pattern_of

TABLE_FILE = "k25_train/parameters/table.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRule:
    """How one parameter is updated."""

    update: OptimName
    """`muonclip`: Muon; `adamw`: AdamW."""
    num_matrices: int
    """Equal blocks of rows that Muon orthogonalises one by one; 0 where AdamW updates element by element."""
    weight_decay: bool
    """Whether `optim.weight_decay` applies. What has one axis (norms, biases) gets none, as is usual and as
    megatron-core has it. Source: our choice; Moonlight, section 2.2, decays the gains of norms as well."""
    lr_scale: float
    """Learning rate as a multiple of `optim.lr`."""
    reason: str
    """Why this rule, in a few words."""


def is_trained(name: str, optim: OptimConfig) -> bool:
    """Whether a parameter is updated at all; a frozen one has no gradient, and no rule is asked for it.

    `name` may be the released checkpoint's as well as ours: those of the vision part are the same.
    """
    return optim.of(ModelPart.of(name)).trained


def rule_of(name: str, shape: tuple[int, ...], optim: OptimConfig, model: ModelConfig) -> ParameterRule:
    """The rule of one parameter.

    Args:
        name: as in `k25_train/model/weights.py`: megatron-core's name under `language_model.`,
            `vision_tower.` or `mm_projector.`. Layer numbers, local or global, make no difference.
        shape: as the rank holds it; experts are stacked [experts, rows, columns].

    Raises:
        ValueError: the table has no such name, or the rule's matrices do not fit the shape.
    """
    entry = table.TABLE.by_stacked_name.get(pattern_of(name))
    if entry is None or entry.kind.is_buffer:
        raise ValueError(f"{name} {list(shape)}: no rule says how it is updated; add it to {TABLE_FILE}")
    kind, part = entry.kind, ModelPart.of(name)
    settings = optim.of(part)
    blocks = kind.blocks if settings.name is OptimName.muonclip else None
    num_matrices = 0 if blocks is None else blocks(shape, model, optim)
    if num_matrices and (len(shape) not in (2, 3) or prod(shape[:-1]) % num_matrices):
        raise ValueError(
            f"{name} {list(shape)}: must be {num_matrices} matrices of equal size, one above the other; its "
            f"entry in {TABLE_FILE} says so"
        )
    return ParameterRule(
        update=OptimName.muonclip if num_matrices else OptimName.adamw,
        num_matrices=num_matrices,
        weight_decay=len(shape) > 1,
        lr_scale=settings.lr_scale,
        reason=_reason(kind, optim, part, uses_muon=num_matrices > 0),
    )


def _reason(kind: Kind, optim: OptimConfig, part: ModelPart, *, uses_muon: bool) -> str:
    if kind.blocks is None:
        return kind.reason
    if not uses_muon:
        return f"optim.{part.value}.name=adamw"
    return kind.reason_per_head if kind.reason_per_head and optim.muon.per_head else kind.reason

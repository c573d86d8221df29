"""By which rule each parameter is updated: a table of all names, free of torch.

Nothing is guessed from a shape: the word embedding has two axes and is no matrix to Muon, stacked experts
have three and are many. The rules are Moonlight's (arXiv 2502.16982, section 2.2): Muon for matrices, AdamW
for word embeddings, output layer and norms. A name that the table lacks is an error.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimConfig, OptimName
from k25_train.config.vision import VisionPart


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


Blocks = Callable[[tuple[int, ...], ModelConfig, OptimConfig], int]
"""From a parameter's shape to the number of true matrices in it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Parameters that share a rule."""

    pattern: str
    """Name; `*` stands for a layer's number."""
    reason: str
    """Why this rule, in a few words."""
    blocks: Blocks | None = None
    """None where AdamW is the rule whatever the configuration says."""


def _whole(_shape: tuple[int, ...], _model: ModelConfig, _optim: OptimConfig) -> int:
    return 1


def _gate_and_up(_shape: tuple[int, ...], _model: ModelConfig, _optim: OptimConfig) -> int:
    return 2


def _query_key_value(_shape: tuple[int, ...], _model: ModelConfig, _optim: OptimConfig) -> int:
    return 3


def _heads(_shape: tuple[int, ...], model: ModelConfig, optim: OptimConfig) -> int:
    return model.num_attention_heads if optim.muon.per_head else 1


def _experts(shape: tuple[int, ...], _model: ModelConfig, _optim: OptimConfig) -> int:
    return shape[0]


def _gates_and_ups_of_experts(shape: tuple[int, ...], _model: ModelConfig, _optim: OptimConfig) -> int:
    return 2 * shape[0]


def _language_model() -> list[Kind]:
    root, layer = "language_model", "language_model.decoder.layers.*"
    attention, mlp = f"{layer}.self_attention", f"{layer}.mlp"
    norms = (
        f"{layer}.input_layernorm",
        f"{layer}.pre_mlp_layernorm",
        f"{attention}.q_layernorm",
        f"{attention}.kv_layernorm",
        f"{root}.decoder.final_layernorm",
    )
    return [
        Kind(f"{root}.embedding.word_embeddings.weight", "rows are words, not a map of features"),
        Kind(f"{root}.output_layer.weight", "rows are words, not a map of features"),
        *(Kind(f"{norm}.weight", "a gain for each feature") for norm in norms),
        Kind(f"{attention}.linear_q_down_proj.weight", "matrix", _whole),
        Kind(f"{attention}.linear_q_up_proj.weight", "matrix of all heads", _heads),
        Kind(f"{attention}.linear_kv_down_proj.weight", "matrix", _whole),
        Kind(f"{attention}.linear_kv_up_proj.weight", "matrix of all heads", _heads),
        Kind(f"{attention}.linear_proj.weight", "matrix", _whole),
        Kind(f"{mlp}.linear_fc1.weight", "gate and up projection", _gate_and_up),
        Kind(f"{mlp}.linear_fc2.weight", "matrix", _whole),
        Kind(f"{mlp}.router.weight", "matrix; gains most from Muon (Moonlight, figure 4)", _whole),
        Kind(f"{mlp}.shared_experts.linear_fc1.weight", "gate and up projection", _gate_and_up),
        Kind(f"{mlp}.shared_experts.linear_fc2.weight", "matrix", _whole),
        Kind(f"{mlp}.experts.gate_up_proj", "gate and up of each expert", _gates_and_ups_of_experts),
        Kind(f"{mlp}.experts.down_proj", "matrix of each expert", _experts),
    ]


def _vision() -> list[Kind]:
    tower, block = "vision_tower", "vision_tower.encoder.blocks.*"
    projections: dict[str, tuple[str, Blocks]] = {
        f"{block}.wqkv": ("query, key and value projection", _query_key_value),
        f"{block}.wo": ("matrix", _whole),
        f"{block}.mlp.fc0": ("matrix", _whole),
        f"{block}.mlp.fc1": ("matrix", _whole),
        "mm_projector.proj.0": ("matrix", _whole),
        "mm_projector.proj.2": ("matrix", _whole),
    }
    norms = (f"{block}.norm0", f"{block}.norm1", f"{tower}.encoder.final_layernorm", "mm_projector.pre_norm")
    biases = (*norms, *projections, f"{tower}.patch_embed.proj")
    return [
        # A matrix in effect, but of raw pixels: Muon's author (K. Jordan) leaves input and output layers to
        # AdamW. Kimi-VL, which has Muon for its tower, does not name this layer.
        Kind(f"{tower}.patch_embed.proj.weight", "input layer, as word embeddings are; our choice"),
        Kind(f"{tower}.patch_embed.pos_emb.weight", "a table of positions"),
        *(Kind(f"{norm}.weight", "a gain for each feature") for norm in norms),
        *(Kind(f"{name}.weight", *matrix) for name, matrix in projections.items()),
        *(Kind(f"{name}.bias", "a bias") for name in biases),
    ]


KIND_OF = {kind.pattern: kind for kind in (*_language_model(), *_vision())}
"""Name of every parameter, `*` for a layer's number -> its kind."""


def is_trained(name: str, optim: OptimConfig) -> bool:
    """Whether a parameter is updated at all; a frozen one has no gradient, and no rule is asked for it.

    `name` may be the released checkpoint's as well as ours: those of the vision part are the same.
    """
    part = VisionPart.of(name)
    return part is None or part in optim.vision.trained.parts


def rule_of(name: str, shape: tuple[int, ...], optim: OptimConfig, model: ModelConfig) -> ParameterRule:
    """The rule of one parameter.

    Args:
        name: as in `k25_train/model/weights.py`: megatron-core's name under `language_model.`,
            `vision_tower.` or `mm_projector.`. Layer numbers, local or global, make no difference.
        shape: as the rank holds it; experts are stacked [experts, rows, columns].

    Raises:
        ValueError: the table has no such name, or the rule's matrices do not fit the shape.
    """
    kind = KIND_OF.get(re.sub(r"(?<=\.(?:layers|blocks)\.)\d+(?=\.)", "*", name))
    if kind is None:
        raise ValueError(
            f"{name} {list(shape)}: no rule says how it is updated; add it to "
            "k25_train/parameters/update_rules.py"
        )
    is_vision = VisionPart.of(name) is not None
    lr_scale = optim.vision.lr_scale if is_vision else 1.0
    chosen = optim.vision.name if is_vision else optim.name
    decays = len(shape) > 1
    if kind.blocks is None or chosen is OptimName.adamw:
        reason = kind.reason if kind.blocks is None else f"optim.{'vision.' * is_vision}name=adamw"
        return ParameterRule(
            update=OptimName.adamw, num_matrices=0, weight_decay=decays, lr_scale=lr_scale, reason=reason
        )
    num_matrices = kind.blocks(shape, model, optim)
    if len(shape) not in (2, 3) or prod(shape[:-1]) % num_matrices:
        raise ValueError(
            f"{name} {list(shape)}: must be {num_matrices} matrices of equal size, one above the other; its "
            "rule in k25_train/parameters/update_rules.py says so"
        )
    return ParameterRule(
        update=OptimName.muonclip,
        num_matrices=num_matrices,
        weight_decay=decays,
        lr_scale=lr_scale,
        reason="a matrix a head" if kind.blocks is _heads and optim.muon.per_head else kind.reason,
    )

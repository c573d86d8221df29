"""Names of released weights, of every form that is read, and what they are called in Kimi-K2.5's release.

The one place for names of others: `RULES`, of which the first that fits counts. A `*` is a number, `**` at
the end any rest. The table of parameters (`k25_train/parameters/table.py`) says what becomes of the release's
names.

Sources, each looked at in the code that writes or reads such a folder:
- Kimi-K2.5, K2.6: index of moonshotai/Kimi-K2.5; also Kimi-VL (`modeling_kimi_vl.py`), whose projector is
  called multi_modal_projector.linear_1 and _2.
- Kimi-K2, Moonlight, DeepSeek-V3: `model.layers…`, as `DeepseekV3ForCausalLM` has them.
- nvidia/Kimi-K2.5-NVFP4: without `.model` (SGLang, `kimi_k25.py`).
- transformers 5.23.0, `kimi_k25`, in its own names: `save_pretrained(save_original_format=False)`
  (`conversion_mapping.py`): rows of q and k are ordered for its half-split rotation, experts are stacked.
- transformers 5.23.0, `save_pretrained()`: meant to give the release's names back, but layers of the
  language model come out as `blocks` (the reverse of its rule for the tower applies to both), the patch
  embedding below `encoder` and the projector's norm below `model`. Such folders exist, so they are read.
- MoonViT-SO-400M: `modeling_moonvit.py`, the tower alone.
- SigLIP-SO-400M (google/siglip-so400m-patch14-384): transformers' `modeling_siglip.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property


class Change(Enum):
    """What is done to a tensor; values and, but for these, layouts are never touched."""

    none = ""
    """Nothing."""
    interleave = "rows of heads interleaved"
    """Rows of each head from half-split to interleaved pairs, as the release's rotation has them."""
    resample = "resampled, bicubic"
    """A square table of positions [N², C] as one of the tower's height and width [H, W, C]."""


@dataclass(frozen=True)
class Rule:
    """Names that differ in numbers, and the rest, alone."""

    source: str
    """Pattern in the folder."""
    released: str | None
    """Pattern in Kimi-K2.5's release, with as many `*`; None for what is left out."""
    change: Change = Change.none
    """What is done to it."""
    part: int = 0
    """Which part it is of a tensor that the release has in one, counted from 0."""
    num_parts: int = 1
    """Parts of that, of equal size along the first axis."""
    why: str = ""
    """Why it is left out."""

    @cached_property
    def expression(self) -> re.Pattern[str]:
        """What finds such names."""
        text = re.escape(self.source).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)")
        return re.compile(text)


@dataclass(frozen=True, slots=True)
class Renamed:
    """A name of the folder that a rule knows."""

    rule: Rule
    """The rule."""
    released: str
    """Its name in the release; empty if it is left out."""


def _attention(source: str, released: str) -> list[Rule]:
    """Query, key and value apart, which MoonViT has in one; with biases."""
    return [
        Rule(f"{source}.{name}_proj.{kind}", f"{released}.wqkv.{kind}", change, part, 3)
        for part, (name, change) in enumerate(
            (("q", Change.interleave), ("k", Change.interleave), ("v", Change.none))
        )
        for kind in ("weight", "bias")
    ]


def _unrotated(rules: list[Rule]) -> list[Rule]:
    """SigLIP has no rotation, so rows stay as they are."""
    return [Rule(rule.source, rule.released, Change.none, rule.part, rule.num_parts) for rule in rules]


_TEXT, _TOWER, _BLOCKS = "language_model.model", "vision_tower", "vision_tower.encoder.blocks.*"
_OWN_TOWER, _OWN_BLOCKS = "model.vision_tower", "model.vision_tower.layers.*"
_SIGLIP, _SIGLIP_BLOCKS = "vision_model", "vision_model.encoder.layers.*"
_ANOTHER_TOWER = "of SigLIP's text tower, head and loss, which the vision tower does not have"

RULES = (
    # What some releases of DeepSeek-V3's kind hold along with the weights.
    Rule("model.layers.*.self_attn.rotary_emb.inv_freq", None, why="computed from the configuration"),
    # transformers 5.23, the release's names as it gives them back.
    Rule("language_model.model.blocks.*.**", f"{_TEXT}.layers.*.**"),
    Rule("vision_tower.encoder.patch_embed.**", f"{_TOWER}.patch_embed.**"),
    # Kimi-K2.5 and Kimi-VL.
    Rule("language_model.model.**", f"{_TEXT}.**"),
    Rule("language_model.lm_head.weight", "language_model.lm_head.weight"),
    Rule("vision_tower.**", f"{_TOWER}.**"),
    Rule("mm_projector.**", "mm_projector.**"),
    Rule("multi_modal_projector.pre_norm.**", "mm_projector.pre_norm.**"),
    Rule("multi_modal_projector.linear_1.**", "mm_projector.proj.0.**"),
    Rule("multi_modal_projector.linear_2.**", "mm_projector.proj.2.**"),
    # nvidia's quantized ones.
    Rule("language_model.**", f"{_TEXT}.**"),
    # transformers 5's own.
    Rule("model.language_model.**", f"{_TEXT}.**"),
    Rule("model.mm_projector.pre_norm.**", "mm_projector.pre_norm.**"),
    Rule("model.mm_projector.in_proj.**", "mm_projector.proj.0.**"),
    Rule("model.mm_projector.out_proj.**", "mm_projector.proj.2.**"),
    Rule(f"{_OWN_TOWER}.patch_embed.proj.**", f"{_TOWER}.patch_embed.proj.**"),
    Rule(f"{_OWN_TOWER}.patch_embed.pos_emb.position_embeddings", f"{_TOWER}.patch_embed.pos_emb.weight"),
    Rule(f"{_OWN_TOWER}.final_layernorm.**", f"{_TOWER}.encoder.final_layernorm.**"),
    Rule(f"{_OWN_BLOCKS}.norm1.**", f"{_BLOCKS}.norm0.**"),
    Rule(f"{_OWN_BLOCKS}.norm2.**", f"{_BLOCKS}.norm1.**"),
    Rule(f"{_OWN_BLOCKS}.mlp.fc1.**", f"{_BLOCKS}.mlp.fc0.**"),
    Rule(f"{_OWN_BLOCKS}.mlp.fc2.**", f"{_BLOCKS}.mlp.fc1.**"),
    Rule(f"{_OWN_BLOCKS}.attn.proj.**", f"{_BLOCKS}.wo.**"),
    *_attention(f"{_OWN_BLOCKS}.attn", _BLOCKS),
    # Kimi-K2, Moonlight, DeepSeek-V3.
    Rule("model.**", f"{_TEXT}.**"),
    Rule("lm_head.weight", "language_model.lm_head.weight"),
    # MoonViT alone.
    Rule("patch_embed.**", f"{_TOWER}.patch_embed.**"),
    Rule("encoder.**", f"{_TOWER}.encoder.**"),
    # SigLIP; its epsilon is 1e-6, MoonViT's 1e-5, and its blocks have no rotation.
    Rule(f"{_SIGLIP}.embeddings.patch_embedding.**", f"{_TOWER}.patch_embed.proj.**"),
    Rule(
        f"{_SIGLIP}.embeddings.position_embedding.weight",
        f"{_TOWER}.patch_embed.pos_emb.weight",
        Change.resample,
    ),
    Rule(f"{_SIGLIP}.post_layernorm.**", f"{_TOWER}.encoder.final_layernorm.**"),
    Rule(f"{_SIGLIP_BLOCKS}.layer_norm1.**", f"{_BLOCKS}.norm0.**"),
    Rule(f"{_SIGLIP_BLOCKS}.layer_norm2.**", f"{_BLOCKS}.norm1.**"),
    Rule(f"{_SIGLIP_BLOCKS}.mlp.fc1.**", f"{_BLOCKS}.mlp.fc0.**"),
    Rule(f"{_SIGLIP_BLOCKS}.mlp.fc2.**", f"{_BLOCKS}.mlp.fc1.**"),
    Rule(f"{_SIGLIP_BLOCKS}.self_attn.out_proj.**", f"{_BLOCKS}.wo.**"),
    *_unrotated(_attention(f"{_SIGLIP_BLOCKS}.self_attn", _BLOCKS)),
    Rule(f"{_SIGLIP}.embeddings.position_ids", None, why="counted"),
    Rule(f"{_SIGLIP}.head.**", None, why=_ANOTHER_TOWER),
    Rule("text_model.**", None, why=_ANOTHER_TOWER),
    Rule("logit_scale", None, why=_ANOTHER_TOWER),
    Rule("logit_bias", None, why=_ANOTHER_TOWER),
)
"""All names that are known, in the order in which they are tried."""


def renamed(name: str) -> Renamed | None:
    """What a name of the folder is in the release; None if no rule fits it."""
    for rule in RULES:
        if match := rule.expression.fullmatch(name):
            return Renamed(rule, "" if rule.released is None else _filled(rule.released, match.groups()))
    return None


def _filled(pattern: str, values: tuple[str, ...]) -> str:
    remaining: Iterator[str] = iter(values)
    return re.sub(r"\*\*|\*", lambda _: next(remaining), pattern)

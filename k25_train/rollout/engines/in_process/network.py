"""transformers' Kimi K2.5, as the engine calls it: embeddings in, logits out, every mask and position given.

Where transformers 5.23 infers something, or departs from the release, it is not asked:

- masks and positions: it would take them from padding (id 0), or from one length of the whole cache;
- placeholders: its model replaces every `<|media_pad|>` by id 0, also where no image belongs to it;
- the table of the tower's positions is resampled as a square, so that a table that is none is refused;
- `config.json`: the one that is exported (`k25_train/export/hf_config.py`), which says what it leaves out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration
from transformers.initialization import no_init_weights

from k25_train.config.model import ModelConfig
from k25_train.export.hf_config import SpecialIds, config_json, context_length
from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.engines.images import ImagePatches
from k25_train.rollout.engines.in_process.attention import use_latent_attention
from k25_train.rollout.engines.in_process.cache import SlotCache

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Number formats of weights and caches."""


class Network:
    """The model; its weights are whatever memory held until the first commit."""

    def __init__(self, model: ModelConfig, ids: SpecialIds, device: torch.device, dtype: torch.dtype) -> None:
        """Raises `EngineError` for a model that transformers has no like of."""
        _check(model, dtype)
        self.media_pad = ids.media_pad
        self.vocab_size = model.vocab_size
        self.max_length = context_length(model.rope)
        self._patch = model.vision.patch_size
        self._device = device
        self._dtype = dtype
        self._num_layers = model.num_layers
        config = Kimi_K25Config.from_dict(config_json(model, ids, DTYPE_NAMES[dtype]))
        # Nothing is drawn: the generator of the process is the trainer's.
        with no_init_weights():
            network: Any = Kimi_K25ForConditionalGeneration._from_config(
                config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
            )
        for module in network.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias = module.e_score_correction_bias.float()
        self._network = network.to(device).eval().requires_grad_(False)
        self._text = self._network.model.language_model
        use_latent_attention(self._text)
        self.weights: dict[str, Tensor] = self._network.state_dict()
        """Parameters and kept buffers by transformers' names; they stay the same tensors."""

    def new_cache(self, num_slots: int) -> SlotCache:
        """A cache with this many slots."""
        text = self._network.config.text_config
        widths = (text.kv_lora_rank, text.qk_rope_head_dim)
        return SlotCache(self._num_layers, num_slots, widths, self._device, self._dtype)

    def image_features(self, image: ImagePatches) -> Tensor:
        """[(h/2)(w/2), C]: what is at the placeholders of an image."""
        pixels = image.patches.to(self._device, torch.float32).div_(255).sub_(0.5).div_(0.5)
        patches = pixels.to(self._dtype).view(-1, 3, self._patch, self._patch)
        grid = torch.tensor([image.grid], device=self._device)
        output = self._network.model.vision_tower(patches, grid_thw=grid)
        features: Tensor = self._network.model.mm_projector(output.pooler_output).squeeze(1)
        return features

    def embed(self, ids: Sequence[int], features: Sequence[Tensor] = ()) -> Tensor:
        """[n, C] of a sequence, with its images' features at its placeholders."""
        tokens = torch.tensor(ids, device=self._device)
        embeddings: Tensor = self._text.embed_tokens(tokens)
        if features:
            embeddings[tokens == self.media_pad] = torch.cat(list(features))
        return embeddings

    def prompts(self, prompts: Sequence[Tensor], cache: SlotCache | None, rows: slice) -> list[Tensor]:
        """Hidden states [n, C] of whole sequences, each alone; their latents go to these slots of the cache.

        Args:
            prompts: embeddings [n, C] of each.
            cache: None keeps nothing.
            rows: one slot for each sequence.
        """
        longest = max(map(len, prompts))
        embeddings = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        positions = torch.arange(longest, device=self._device)
        if cache is not None:
            cache.begin_prompts(rows, longest)
        # Padding is behind all tokens of a sequence, which look back alone.
        mask = self._mask(positions, longest).view(1, 1, longest, longest)
        hidden = self._forward(embeddings, positions.unsqueeze(0), mask, cache)
        return [each[: len(prompt)] for each, prompt in zip(hidden, prompts, strict=True)]

    def tokens(self, ids: Sequence[int], positions: Sequence[int], cache: SlotCache) -> Tensor:
        """Hidden states [b, C] of one more token in each of the first b slots, at its position there."""
        places = torch.tensor(positions, device=self._device)
        num_keys = max(positions) + 1
        cache.begin_tokens(places, num_keys)
        mask = self._mask(places, num_keys).view(len(ids), 1, 1, num_keys)
        embeddings = self.embed(ids).unsqueeze(1)
        return self._forward(embeddings, places.unsqueeze(1), mask, cache).squeeze(1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] of hidden states [n, C]."""
        logits: Tensor = self._network.lm_head(hidden)
        return logits

    def _mask(self, positions: Tensor, num_keys: int) -> Tensor:
        """[n, num_keys]: 0 where a token looks, the smallest number where it does not."""
        unseen = torch.arange(num_keys, device=self._device) > positions.unsqueeze(1)
        return unseen.to(self._dtype) * torch.finfo(self._dtype).min

    def _forward(
        self, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache | None
    ) -> Tensor:
        output = self._text(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def _check(model: ModelConfig, dtype: torch.dtype) -> None:
    wrong = ""
    if not (model.has_vision and model.has_latent_attention):
        wrong = "has no vision part, or no latent attention; transformers' Kimi K2.5 has both"
    elif model.vision.pos_emb_height != model.vision.pos_emb_width:
        wrong = "has a table of vision positions that is no square, which transformers resamples as one"
    if wrong:
        raise EngineError(f"model.name={model.name} {wrong}\n  -> use rollout=vllm")
    if dtype not in DTYPE_NAMES:
        raise EngineError(f"weights in {dtype}: the engine in process has float32 or bfloat16")

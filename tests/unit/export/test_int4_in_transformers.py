"""transformers loads an INT4 export with compressed-tensors, and gets the weights of the release's rule."""

from __future__ import annotations

from pathlib import Path

import torch

from k25_train.convert.__main__ import main
from k25_train.data.tokenizer import train_tokenizer
from k25_train.int4 import dequantize, quantize
from tests.helpers.hf_losses import load_exported
from tests.helpers.hf_reference import tiny_model_config
from tests.helpers.released_checkpoints import released_state, stacked, write_weights
from tests.helpers.tiny_shards import VOCAB_SIZE, make_text


def test_transformers_unpacks_every_expert_to_the_same_bits(tmp_path: Path) -> None:
    model = tiny_model_config(vocab_size=VOCAB_SIZE)
    state = released_state(model)
    checkpoint = write_weights(tmp_path / "step_0", model, stacked(state))
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, tmp_path / "tokenizer.json")
    words = f"export {checkpoint} {tmp_path / 'out'} --dtype int4 --tokenizer {tmp_path / 'tokenizer.json'}"
    assert main([*words.split(), "--workers", "1"]) == 0

    loaded = dict(load_exported(tmp_path / "out").named_parameters())
    num_compared = 0
    for layer in range(model.num_dense_layers, model.num_layers):
        for expert in range(model.num_experts):
            source = f"language_model.model.layers.{layer}.mlp.experts.{expert}"
            found = f"model.language_model.layers.{layer}.mlp.experts"
            # Stacked there, the gate above the up projection; products of codes and scales, rounded once.
            gate, up, down = (
                dequantize(quantize(state[f"{source}.{name}_proj.weight"]), torch.bfloat16).float()
                for name in ("gate", "up", "down")
            )
            assert torch.equal(loaded[f"{found}.gate_up_proj"][expert].float(), torch.cat([gate, up]))
            assert torch.equal(loaded[f"{found}.down_proj"][expert].float(), down)
            num_compared += 3
    assert num_compared == 48

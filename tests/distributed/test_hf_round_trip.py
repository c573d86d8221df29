"""A `kimi_k25` that transformers saved: imported, exported, and read by transformers again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k25_train.convert.__main__ import main
from tests.helpers.hf_comparison import BATCHES, TOLERANCE, make_batch
from tests.helpers.hf_reference import build_hf_reference, hf_logits, tiny_model_config
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.released_checkpoints import released_state
from tests.helpers.tiny_shards import VOCAB_SIZE, make_text

pytestmark = pytest.mark.distributed

MODEL = tiny_model_config(vocab_size=VOCAB_SIZE)


def our_logits(context: RankContext, checkpoint: Path) -> dict[str, Tensor]:
    """Logits of every batch, of our model with the weights of a checkpoint."""
    from k25_train.checkpoint.files.stored import StoredCheckpoint
    from k25_train.export.listing import released_tensors
    from k25_train.export.released import to_ours
    from k25_train.export.stream import stored_tensors
    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.model.weights import load_global_state
    from tests.helpers.model_chunks import SERIAL, WHOLE_MODEL, build_whole_model, start, train_config

    ours = build_whole_model(MODEL, train_config(), start(context, SERIAL, MODEL.num_layers)).eval()
    stream = stored_tensors(StoredCheckpoint.open(checkpoint), released_tensors(MODEL))
    load_global_state(ours, WHOLE_MODEL, to_ours({each.name: each.tensor for each in stream}))
    logits = {}
    for name, (lengths, grids) in BATCHES.items():
        tokens, places, pixels = make_batch(MODEL, lengths, grids)
        documents = PackedDocuments.of(lengths, tokens.device)
        with torch.no_grad():
            logits[name] = ours(tokens, documents, None, places, pixels if grids else None, grids)
    return logits


def read_by_transformers(folder: Path, **options: Any) -> torch.nn.Module:
    """The model of a folder in float32; every tensor must have been found, and none be left."""
    from transformers import Kimi_K25ForConditionalGeneration

    model, info = Kimi_K25ForConditionalGeneration.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        dtype=torch.float32,
        **options,
    )
    assert not {key: value for key, value in info.items() if value}
    return model.eval()


def logits_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of every batch."""
    logits = {}
    for name, (lengths, grids) in BATCHES.items():
        tokens, _, pixels = make_batch(MODEL, lengths, grids)
        # An exported folder says which token is an image's place, as its vocabulary does.
        model.config.image_token_id = VOCAB_SIZE - 2
        with torch.no_grad():
            logits[name] = hf_logits(model, tokens, lengths, pixels if grids else None, grids)
    return logits


def convert(*words: object) -> None:
    assert main(list(map(str, words))) == 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from k25_train.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, path)
    return path


def test_a_saved_model_comes_back_identical(tokenizer: Path, tmp_path: Path) -> None:
    original, _ = build_hf_reference(MODEL, released_state(MODEL))
    original.save_pretrained(tmp_path / "saved")
    convert("import", tmp_path / "saved", tmp_path / "imported", "--workers", 1)
    convert("export", tmp_path / "imported", tmp_path / "exported", "--tokenizer", tokenizer, "--workers", 1)
    again = read_by_transformers(tmp_path / "exported")

    expected, found = original.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    theirs, theirs_again = logits_of(original), logits_of(again)
    (ours,) = run_ranks(our_logits, 1, tmp_path / "imported")
    for name, logits in theirs.items():
        assert torch.equal(theirs_again[name], logits), name
        difference = (ours[name] - logits).abs().max().item()
        assert math.isfinite(difference) and difference < TOLERANCE, (name, difference)


def test_int4_is_read_by_transformers_and_comes_back_byte_by_byte(tokenizer: Path, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    reference, _ = build_hf_reference(MODEL, released_state(MODEL))
    reference.save_pretrained(tmp_path / "saved")
    convert("import", tmp_path / "saved", tmp_path / "bf16", "--workers", 1)
    words = ("--dtype", "int4", "--tokenizer", tokenizer, "--workers", 1)
    convert("export", tmp_path / "bf16", tmp_path / "released", *words)
    convert("import", tmp_path / "released", tmp_path / "dequantised", "--workers", 1)

    # 1. Out of the import, by the weights alone, and with the source at hand, which gives its small files.
    convert("export", tmp_path / "dequantised", tmp_path / "again", *words)
    convert("export", tmp_path / "dequantised", tmp_path / "like", "--dtype", "int4", "--workers", 1)
    released = {path.name: path.read_bytes() for path in (tmp_path / "released").iterdir()}
    for folder in ("again", "like"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == released

    # 2. transformers, which dequantises through compressed-tensors, has what our import has in bfloat16.
    convert("export", tmp_path / "dequantised", tmp_path / "plain", "--tokenizer", tokenizer, "--workers", 1)
    expected = read_by_transformers(tmp_path / "plain").state_dict()
    packed = CompressedTensorsConfig(dequantize=True)
    found = read_by_transformers(tmp_path / "released", quantization_config=packed).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(torch.bfloat16), tensor.to(torch.bfloat16)), name

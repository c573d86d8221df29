"""vLLM serves the exported folder and gives every token the probability that it has in training.

The engine is another implementation that reads the folder alone: config.json, the weights, the tokenizer and
the limits of images. Its environment is its own (`make engine`), since it wants an older transformers.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.exported_run import ExportedRun, export_run, train_briefly
from tests.helpers.hf_losses import has_media, load_exported
from tests.helpers.hf_reference import hf_logits
from tests.helpers.tiny_shards import make_picture
from tests.helpers.vllm_server import Server, serving

pytestmark = pytest.mark.engine

TOLERANCE = 1e-5
"""Largest difference of a log-probability, float32 on both sides."""
SAME_EPS = "model.rms_norm_eps=1e-6"
"""vLLM 0.32.0 gives the norms of the compressed query and key-value `rms_norm_eps` (`deepseek_v2.py`), where
the release's code and transformers have 1e-6 whatever config.json says. With the release's 1e-5 for all other
norms, a small model's log-probabilities differ by up to 1.3e-4 in vLLM; this one has 1e-6 for all of them."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedRun:
    """A short training run, evaluated and exported."""
    work = tmp_path_factory.mktemp("served")
    checkpoint, tokenizer = train_briefly(work, SAME_EPS)
    return export_run(checkpoint, tokenizer, work)


@pytest.fixture(scope="module")
def server(exported: ExportedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(exported.folder, tmp_path_factory.mktemp("vllm")) as running:
        yield running


def text_documents(dump: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, losses and loss mask of every document without media in the dumped batches."""
    for path in sorted(dump.glob("batch_*.safetensors")):
        batch = load_file(path)
        lengths = batch["document_lengths"].tolist()
        parts = (batch[name].split(lengths) for name in ("tokens", "losses", "loss_mask"))
        for tokens, losses, mask, media in zip(*parts, has_media(batch).split(lengths), strict=True):
            if mask[:-1].any() and not media.any():
                yield tokens, losses, mask


def test_text_has_the_losses_of_k25_eval(exported: ExportedRun, server: Server) -> None:
    differences, num_tokens = [], 0
    for tokens, losses, mask in text_documents(exported.dump):
        served = torch.tensor(server.prompt_logprobs(tokens.tolist()))
        counts = mask[:-1] > 0
        differences.append((served + losses[:-1])[counts].abs().max().item())
        num_tokens += int(counts.sum())
    assert num_tokens > 50
    assert max(differences) <= TOLERANCE, differences


def test_an_image_is_seen_as_transformers_sees_it(exported: ExportedRun, server: Server) -> None:
    model = load_exported(exported.folder)
    found = {}
    for name, seed in {"image": 1, "another": 2}.items():
        image = make_picture(84, 56, seed)
        tokens, served = server.image_logprobs(image, "the red picture shows one square and two small shapes")
        found[name] = expected_logprobs(model, tokens, image), torch.tensor(served)
        assert tokens.count(model.config.image_token_id) == 6
    for ours, served in found.values():
        assert (ours - served).abs().max() <= TOLERANCE
    # The pixels count: with another image the same words are more than a hundred bars away.
    assert (found["image"][1] - found["another"][1]).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def expected_logprobs(model: torch.nn.Module, tokens: list[int], image: object) -> torch.Tensor:
    """What transformers gives the tokens, with the patches of an image whose sides are multiples of 28."""
    import numpy as np

    pixels = torch.from_numpy(np.asarray(image)).float() / 127.5 - 1
    height, width = pixels.shape[0] // 14, pixels.shape[1] // 14
    patches = pixels.view(height, 14, width, 14, 3).permute(0, 2, 4, 1, 3).reshape(height * width, -1)
    ids = torch.tensor(tokens)
    logits = hf_logits(model, ids, [len(tokens)], patches, [(1, height, width)])
    return logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)

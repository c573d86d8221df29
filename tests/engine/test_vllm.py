"""vLLM gives every token the probability that it has in training, and takes new weights whole.

The engine is another implementation that reads the exported folder alone: config.json, the weights, the
tokenizer and the limits of images. Its environment is its own (`make engine`).
"""

import asyncio
import io
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from k25_train.rollout.engines.base import EngineError, PauseMode, ProbeSequence
from k25_train.rollout.engines.http_engine import HttpEngine
from tests.helpers.hf_losses import has_media, load_exported
from tests.helpers.hf_reference import hf_logits
from tests.helpers.tiny_shards import make_picture
from tests.helpers.vllm_engine import ServedRun

pytestmark = pytest.mark.engine

MEAN, MOST = 2e-5, 1e-4
"""Mean and largest difference of a log-probability, float32 on both sides. Without the extension, which gives
the latent norms the release's epsilon, the largest is above it."""


def run(served: ServedRun, body: Callable[[HttpEngine], Awaitable[None]]) -> None:
    """Run a test with a client."""

    async def connected() -> None:
        async with served.connected() as engine:
            await body(engine)

    asyncio.run(connected())


def text_documents(dump: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, losses and loss mask of every document without media in the dumped batches."""
    for path in sorted(dump.glob("batch_*.safetensors")):
        batch = load_file(path)
        lengths = batch["document_lengths"].tolist()
        parts = (batch[name].split(lengths) for name in ("tokens", "losses", "loss_mask"))
        for tokens, losses, mask, media in zip(*parts, has_media(batch).split(lengths), strict=True):
            if mask[:-1].any() and not media.any():
                yield tokens, losses, mask


def assert_near(differences: np.ndarray, what: str) -> None:
    found = np.abs(differences)
    print(f"{what}: {len(found)} tokens, mean {found.mean():.1e}, most {found.max():.1e}")
    assert found.mean() <= MEAN and found.max() <= MOST


def test_text_has_the_log_probabilities_of_the_trainer(served: ServedRun) -> None:
    async def body(engine: HttpEngine) -> None:
        differences: list[np.ndarray] = []
        for tokens, losses, mask in text_documents(served.dump):
            (values,) = await engine.probe([ProbeSequence(tuple(tokens.tolist()), ())])
            differences.append((values + losses[:-1].numpy())[mask[:-1].numpy() > 0])
        assert sum(map(len, differences)) > 50
        assert_near(np.concatenate(differences), "text")

    run(served, body)


def images_of(served: ServedRun) -> dict[str, tuple[ProbeSequence, Image.Image]]:
    pad = served.ids.media_pad
    found = {}
    for name, seed in {"image": 1, "another": 2}.items():
        picture, file = make_picture(84, 56, seed), io.BytesIO()
        picture.save(file, "PNG")
        found[name] = ProbeSequence((40, pad, *range(50, 70)), (file.getvalue(),)), picture
    return found


def test_an_image_is_seen_as_transformers_sees_it(served: ServedRun) -> None:
    async def body(engine: HttpEngine) -> None:
        model, probes = load_exported(served.folder), {}
        for name, (sequence, picture) in images_of(served).items():
            (probes[name],) = await engine.probe([sequence])
            ids = served.ids.expanded(*sequence).tolist()
            assert ids.count(served.ids.media_pad) == 6
            assert_near(probes[name] - expected_logprobs(model, ids, picture), name)
        # The pixels count: with another image the same words are more than a hundred bars away.
        assert np.abs(probes["image"] - probes["another"]).max() > 100 * MEAN

    run(served, body)


@torch.no_grad()
def expected_logprobs(model: torch.nn.Module, tokens: list[int], image: Image.Image) -> np.ndarray:
    """What transformers gives the tokens, with the patches of an image whose sides are multiples of 28."""
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    height, width = pixels.shape[0] // 14, pixels.shape[1] // 14
    patches = pixels.view(height, 14, width, 14, 3).permute(0, 2, 4, 1, 3).reshape(height * width, -1)
    ids = torch.tensor(tokens)
    logits = hf_logits(model, ids, [len(tokens)], patches, [(1, height, width)])
    found: np.ndarray = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1).numpy()
    return found


async def push(engine: HttpEngine, folder: Path) -> None:
    version = (await engine.state()).version + 1
    await engine.stage(folder, version)
    await engine.pause(PauseMode.keep)
    await engine.commit(version)
    await engine.resume()


def test_new_weights_are_taken_whole_and_looked_at_with_images(served: ServedRun) -> None:
    sequences = [ProbeSequence(tuple(range(40, 80)), ()), images_of(served)["image"][0]]

    async def body(engine: HttpEngine) -> None:
        model, picture = load_exported(served.other), images_of(served)["image"][1]
        old = await engine.probe(sequences)
        await push(engine, served.other)
        text, image = await engine.probe(sequences)
        ids = [served.ids.expanded(*sequence).tolist() for sequence in sequences]
        with torch.no_grad():
            logits = hf_logits(model, torch.tensor(ids[0]), [len(ids[0])])
        words = torch.tensor(ids[0])[1:, None]
        assert_near(text - logits[:-1].log_softmax(-1).gather(1, words).squeeze(1).numpy(), "new text")
        # Features of the image that older weights have made are not taken again.
        assert_near(image - expected_logprobs(model, ids[1], picture), "new image")
        await push(engine, served.folder)
        for before, after in zip(old, await engine.probe(sequences), strict=True):
            assert np.abs(before - after).max() <= 1e-6

    run(served, body)


def test_vllms_own_reload_leaves_wrong_experts_which_the_probe_tells(served: ServedRun) -> None:
    sequence = ProbeSequence(tuple(range(40, 80)), ())

    async def body(engine: HttpEngine) -> None:
        (right,) = await engine.probe([sequence])
        http = engine._http
        plain = {"method": "reload_weights", "kwargs": {"weights_path": str(served.folder)}}
        answer = await http.post("/collective_rpc", plain, seconds=60)
        assert answer == {"results": [None]}, "it says nothing of it"
        await http.post("/reset_prefix_cache", seconds=60)
        (wrong,) = await engine.probe([sequence])
        assert np.abs(wrong - right).max() > 10 * MOST
        await push(engine, served.folder)
        (again,) = await engine.probe([sequence])
        assert np.abs(again - right).max() <= 1e-6

    run(served, body)


def test_a_response_that_does_not_fit_is_named(served: ServedRun) -> None:
    async def body(engine: HttpEngine) -> None:
        with pytest.raises(EngineError, match=r"length after 509 of at most 2000 tokens"):
            await engine.generate(served.subject().request(max_tokens=2000, temperature=0.0))

    run(served, body)

"""Images in the right places, gradients where they belong, and one start for every layout."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import RankContext, RankError, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.tiny_model import build_random_model, documents, random_tokens

pytestmark = pytest.mark.distributed


GRIDS = ((1, 4, 6), (4, 2, 6), (1, 2, 2), (2, 4, 4))
"""Two images and two video chunks: 6 + 3 + 1 + 4 placeholders."""


def pixels_of(grids: tuple[tuple[int, int, int], ...]) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(sum(map(math.prod, grids)), 588, generator=generator)


def embeddings_with_media(context: RankContext) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """(decoder input, its plain embeddings, features of each item encoded alone, places)."""
    model = build_random_model(context).eval()
    tokens, pixels = random_tokens(64), pixels_of(GRIDS)
    places = torch.tensor([2, 3, 4, 9, 10, 11, 20, 25, 26, 40, 41, 50, 51, 63])
    inputs: list[Tensor] = []
    model.language_model.decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens, documents(), None, places, pixels, GRIDS)
        model(tokens, documents())
        items = pixels.split([math.prod(grid) for grid in GRIDS])
        features = [model.encode(item, [grid]) for item, grid in zip(items, GRIDS, strict=True)]
    return inputs[0].squeeze(1), inputs[1].squeeze(1), features, places


def test_features_take_the_placeholders_in_the_order_of_the_items() -> None:
    mixed, plain, features, places = run_ranks(embeddings_with_media, 1)[0]
    assert [len(item) for item in features] == [6, 3, 1, 4]
    torch.testing.assert_close(mixed[places], torch.cat(features), rtol=1e-5, atol=1e-5)
    text = torch.ones(64, dtype=torch.bool)
    text[places] = False
    assert torch.equal(mixed[text], plain[text])


def put_too_few_features(context: RankContext) -> None:
    build_random_model(context)(
        random_tokens(64), documents(), None, torch.arange(13), pixels_of(GRIDS), GRIDS
    )


def test_features_that_do_not_fill_the_placeholders_are_refused() -> None:
    with pytest.raises(RankError, match="14 vision features for 13 media placeholders: each item needs"):
        run_ranks(put_too_few_features, 1)


def vision_gradients(context: RankContext, num_items: int) -> dict[str, float | None]:
    """Largest gradient of each parameter of tower and projector."""
    model = build_random_model(context)
    grids = GRIDS[:num_items]
    places = torch.arange(sum(h * w // 4 for _, h, w in grids))
    tokens = random_tokens(64)
    model(tokens, documents(), tokens, places, pixels_of(grids), grids).sum().backward()
    vision = ((name, weight) for name, weight in model.named_parameters() if "language_model" not in name)
    return {name: None if weight.grad is None else weight.grad.abs().max().item() for name, weight in vision}


def test_a_batch_of_text_gives_the_tower_zero_gradients() -> None:
    gradients = run_ranks(vision_gradients, 1, 0)[0]
    assert len(gradients) > 40
    assert set(gradients.values()) == {0.0}


def test_a_batch_with_images_gives_every_vision_weight_a_gradient() -> None:
    gradients = run_ranks(vision_gradients, 1, 4)[0]
    assert all(gradient is not None and gradient > 0 for gradient in gradients.values())


def initial_weights(context: RankContext, arguments: list[str]) -> dict[str, bytes]:
    """The bytes of every weight that this rank holds before the first step, by global name."""
    from k25_train.model.build import chunk_place
    from k25_train.model.weights import global_state

    run = start_run(context, arguments)
    weights = {}
    for stage, chunk in enumerate(run.chunks):
        place = chunk_place(run.config, run.topology, stage)
        for name, tensor in global_state(chunk.module, place):
            assert name not in weights, "two chunks of a rank hold the same weight"
            weights[name] = tensor.contiguous().numpy().tobytes()
    run.data.close()
    return weights


LAYOUTS = {
    "dp2": ({"dp": 2}, []),
    "pp2 x vpp2 x ep2": ({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, []),
    "a last chunk without layers": ({"pp": 2, "vpp": 2}, ["parallelism.layout='Et|ttt|t|L'"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_from_the_same_weights(name: str, data: Path, tmp_path: Path) -> None:
    sizes, more = LAYOUTS[name]
    serial = run_ranks(initial_weights, 1, overrides(data, tmp_path, *layout()))[0]
    num_ranks = sizes.get("pp", 1) * sizes.get("dp", 1)
    by_rank = run_ranks(initial_weights, num_ranks, overrides(data, tmp_path, *layout(**sizes), *more))
    for weights in by_rank:
        assert all(serial[name] == found for name, found in weights.items())
    assert set().union(*by_rank) == set(serial)

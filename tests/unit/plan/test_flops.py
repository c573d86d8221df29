"""FLOPs from the configuration against those that torch counts in transformers' model, and by hand."""

from __future__ import annotations

import random

import torch
from torch.utils.flop_counter import FlopCounterMode

from k25_train.compose.resolve import compose
from k25_train.config.parts import EVERY_PART, ModelPart
from k25_train.model.projector import PatchMergerProjector
from k25_train.plan.batch_sizes import BatchSizes
from k25_train.plan.flops import encoder_cost, tower_cost, training_flops
from parallel.dep.grid import Grid
from tests.helpers.forward_flops import text_forward_flops, token_multiply_adds, vision_forward_flops
from tests.helpers.hf_reference import build_hf_reference, hf_image_features, hf_logits, tiny_model_config
from tests.helpers.trained import TRAINED

GRIDS = [Grid(1, 8, 4), Grid(3, 6, 4), Grid(1, 2, 2)]


def test_language_model_equals_torch_count() -> None:
    model = tiny_model_config()
    hf_model, _ = build_hf_reference(model)
    documents = (13, 29)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf_logits(hf_model, torch.arange(42), documents)
    # transformers' eager attention computes the masked half of each square too.
    masked_pairs = sum(n * n - n * (n + 1) // 2 for n in documents)
    head_dims = model.q_head_dim + model.v_head_dim
    masked = 2 * masked_pairs * model.num_layers * model.num_attention_heads * head_dims
    assert counter.get_total_flops() == text_forward_flops(model, documents) + masked


def test_tower_and_projector_equal_torch_count() -> None:
    model = tiny_model_config()
    hf_model, _ = build_hf_reference(model)
    pixels = torch.randn(sum(grid.num_patches for grid in GRIDS), 588)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf_image_features(hf_model, pixels, GRIDS)
    assert counter.get_total_flops() == vision_forward_flops(model.vision, model.hidden_size, GRIDS)


def test_cost_of_the_real_tower_by_hand() -> None:
    model = compose(["experiment=k25_pretrain_4k"]).model
    cost = encoder_cost(model.vision, model.hidden_size)
    assert cost.per_patch == 2 * (588 * 1152 + 27 * (4 * 1152 * 1152 + 2 * 1152 * 4304))
    assert cost.per_pair == 2 * 27 * 2 * 1152
    assert cost.per_token == 2 * (4608 * 4608 + 4608 * 7168)


def test_training_is_three_forward_passes() -> None:
    model = tiny_model_config()
    forward = text_forward_flops(model, [7]) + vision_forward_flops(model.vision, model.hidden_size, GRIDS)
    assert training_flops(model, BatchSizes.of([7], GRIDS), TRAINED["all"]) == 3 * forward
    assert training_flops(model, BatchSizes.of([7], []), TRAINED["all"]) == 3 * text_forward_flops(model, [7])


def test_a_frozen_language_model_hands_gradients_on_alone() -> None:
    """Weights have none, a product less each; attention has none of these."""
    model = tiny_model_config()
    forward, of_pairs = text_forward_flops(model, [7]), 28 - 7
    attention = (forward - text_forward_flops(model, [1] * 7)) // of_pairs * 28
    vision = vision_forward_flops(model.vision, model.hidden_size, GRIDS)
    trained = EVERY_PART - {ModelPart.language_model}
    found = training_flops(model, BatchSizes.of([7], GRIDS), trained)
    assert found == 2 * forward + attention + 3 * vision


def test_what_is_frozen_is_one_forward_pass() -> None:
    """The projector's trained norm comes first, so that torch goes back through both of its matrices."""
    model = tiny_model_config()
    projector = PatchMergerProjector(model.vision, model.hidden_size)
    num_tokens = sum(grid.num_tokens for grid in GRIDS)
    with FlopCounterMode(display=False) as counter:
        projector(torch.randn(num_tokens, 4, model.vision.hidden_size)).sum().backward()
    of_tower = sum(tower_cost(model.vision).of_item(grid) for grid in GRIDS)
    text = training_flops(model, BatchSizes.of([7], []), TRAINED["all"])
    found = {
        which: training_flops(model, BatchSizes.of([7], GRIDS), trained) - text
        for which, trained in TRAINED.items()
    }
    assert found["projector"] == of_tower + counter.get_total_flops()
    assert found["nothing"] == vision_forward_flops(model.vision, model.hidden_size, GRIDS)


def test_the_sums_of_a_batch_give_what_its_documents_and_items_add_up_to() -> None:
    """Document by document, layer by layer, as it was counted before there were sums."""
    model = compose(["experiment=k25_pretrain_4k"]).model
    draw = random.Random(0)
    lengths = [draw.randint(1, 4096) for _ in range(300)]
    grids = [Grid(draw.randint(1, 4), 2 * draw.randint(1, 64), 2 * draw.randint(1, 64)) for _ in range(80)]
    text = sum(text_forward_flops(model, [length]) for length in lengths)
    tower = sum(tower_cost(model.vision).of_item(grid) for grid in grids)
    vision = vision_forward_flops(model.vision, model.hidden_size, grids)
    expected = {
        "all": 3 * (text + vision),
        "projector": 3 * (text + vision - tower) + tower,
        "nothing": 3 * text + vision,
    }
    sizes = BatchSizes.of(lengths, grids)
    assert {which: training_flops(model, sizes, trained) for which, trained in TRAINED.items()} == expected


def test_attention_counts_documents_apart() -> None:
    model = tiny_model_config()
    per_token = 2 * token_multiply_adds(model)
    whole = text_forward_flops(model, [64]) - 64 * per_token
    halves = text_forward_flops(model, [32, 32]) - 64 * per_token
    assert whole / halves == (64 * 65) / (2 * 32 * 33)

"""A step's row costs nothing where nobody writes it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from k25_train.compose.resolve import compose
from k25_train.data.mix.mixture import mixtures
from k25_train.data.served import Served
from k25_train.plan.batch_sizes import BatchSizes

CONFIG = compose(
    ["experiment=smoke", "data.schedule={late: {from_step: 5, weights: {text: 0.25}, vision_ratio: null}}"]
)


@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_rank_that_writes_makes_a_row(is_main: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pytest.importorskip("k25_train.training.trainer")
    made: list[int] = []
    monkeypatch.setattr(
        trainer, "metrics_row", lambda config, step, result, is_mixed_anew: made.append(step) or {}
    )
    assert trainer.row_of(SimpleNamespace(is_main=is_main, config=None), 7, None, is_mixed_anew=False) == {}
    assert made == [7] * is_main


def test_a_row_has_what_the_batch_amounts_to() -> None:
    from k25_train.training.rows import metrics_row

    sizes = BatchSizes(
        num_tokens=100,
        num_token_pairs=700,
        num_items=3,
        num_vision_tokens=10,
        num_patches=40,
        num_patch_pairs=900,
    )
    nothing: Any = SimpleNamespace(max_logits=())
    from k25_train.training.device_memory import MemoryFigures, NoMemoryFigures
    from k25_train.training.expert_load import NO_EXPERTS, ExpertFigures
    from k25_train.training.tower import NoSummary
    from parallel.activations.offload import NoOffload

    result = SimpleNamespace(
        sizes=sizes,
        served={"web": Served(60), "pages": Served(40)},
        loader_state={"sources": {"web": {"epochs_used": 1.25}, "gone": {"epochs_used": 3.0}}},
        loss=1.0,
        grad_norm=1.0,
        part_grad_norms={"mm_projector": 0.5},
        source_losses={"web": 2.0},
        num_sequences=8,
        experts=ExpertFigures(loads=(1.5, 2.25), dead=1, bias=0.25, bias_change=0.125),
        weight_norms={"mm_projector": 3.0},
        learning_rate=1.0,
        step_time_s=2.0,
        data_wait_s=0.5,
        reads={"retries": 2, "cache_hits": 0},
        pixels_read=0,
        vision=NoSummary(),
        offload=NoOffload(),
        memory=NoMemoryFigures(),
        clip=nothing,
    )
    row = metrics_row(CONFIG, 1, result, is_mixed_anew=True)
    assert not [key for key in row if key.startswith("memory_")]
    assert {key: row[key] for key in row if key.startswith("data_")} == {
        "data_wait_s": 0.5,
        "data_retries": 2,
    }
    assert "pixels_read" not in row
    without = replace(CONFIG, data=replace(CONFIG.data, zero_vision=True))
    assert metrics_row(without, 1, result, is_mixed_anew=True)["pixels_read"] == 0
    assert (row["tokens"], row["text_tokens"], row["vision_tokens"]) == (100, 90, 10)
    assert (row["source_tokens/web"], row["source_tokens/pages"]) == (60, 40)
    assert row["source_epochs/web"] == 1.25 and "source_epochs/gone" not in row
    assert (row["images"], row["patches"], row["tokens_per_s"]) == (3, 40, 50.0)
    assert (row["loss/web"], row["weight_norm/mm_projector"]) == (2.0, 3.0)
    assert row["grad_norm/mm_projector"] == 0.5
    assert (row["expert_load"], row["expert_loads"], row["dead_experts"]) == (2.25, [1.5, 2.25], 1)
    assert (row["expert_bias"], row["expert_bias_change"]) == (0.25, 0.125)
    assert (row["batch"], row["seq_len"], row["vision_ratio"]) == (8, 256, 0.0)
    assert row["padding_share"] == 1 - 100 / 2048 and row["tokens_per_s_per_gpu"] == 12.5
    result.experts = NO_EXPERTS
    assert not [key for key in metrics_row(CONFIG, 1, result, is_mixed_anew=True) if "expert" in key]
    result.memory = MemoryFigures(peak_allocated_bytes=70, peak_reserved_bytes=75, planned_bytes=65, rank=3)
    row = metrics_row(CONFIG, 1, result, is_mixed_anew=True)
    assert row["memory_peak_allocated_bytes"] == 70 and row["memory_peak_reserved_bytes"] == 75
    assert (row["memory_planned_bytes"], row["memory_rank"]) == (65, 3)


def test_a_smaller_step_of_a_ramp_is_no_padding() -> None:
    from k25_train.training.rows import batch_figures

    config = compose(["experiment=smoke", "train.global_batch_size=16"])
    result: Any = SimpleNamespace(sizes=SimpleNamespace(num_tokens=8 * 256), num_sequences=8, served={})
    assert batch_figures(config, result)["batch"] == 8
    assert batch_figures(config, result)["padding_share"] == 0


def test_weights_are_told_where_a_mixture_begins() -> None:
    from k25_train.training.rows import weights

    before = {f"source_weight/{name}": weight for name, weight in mixtures(CONFIG.data)[0].weights.items()}
    assert weights(CONFIG, 3, is_mixed_anew=True) == before
    assert weights(CONFIG, 3, is_mixed_anew=False) == weights(CONFIG, 6, is_mixed_anew=False) == {}
    late = before | {"source_weight/text": 0.25}
    assert weights(CONFIG, 5, is_mixed_anew=False) == weights(CONFIG, 9, is_mixed_anew=True) == late

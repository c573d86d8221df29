"""What a checkpoint keeps of its data, and how a change of the mixture is told and remembered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k25_train.checkpoint import folders
from k25_train.checkpoint.data_state import (
    MOST_MIXTURES,
    DataState,
    Mixture,
    changes,
    mixture_of,
    read_data_state,
)
from k25_train.compose.resolve import compose, to_yaml
from k25_train.errors import CheckpointError
from tests.helpers.written_checkpoints import write_checkpoint

SMOKE = ["experiment=smoke"]
OTHER = [
    "~data.sources.ocr",
    "data.sources.web={format: indexed, path: web, weight: 0.5, epochs: 2}",
    "data.sources.text.weight=0.3",
    "data.vision_ratio=0.2",
    "data.schedule={late: {from_step: 9, weights: {text: 0.1}}}",
]


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    state = DataState({"step": 3, "sources": {"text": {"epoch": 1}}}, [mixture_of(compose(SMOKE), 1)])
    folder = write_checkpoint(tmp_path, 3, texts={folders.DATA_STATE: state.to_text()})
    assert read_data_state(folder) == state
    assert len(state.to_text()) < 4096


def test_one_without_has_the_mixture_of_its_configuration(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3, texts={folders.CONFIG: to_yaml(compose(SMOKE))})
    # What no manifest lists, no run wrote.
    (folder / folders.DATA_STATE).write_text("{}")
    assert read_data_state(folder) == DataState({}, [mixture_of(compose(SMOKE), 1)])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "unreadable"),
        ("[]", "unreadable"),
        ('{"format_version": 1, "loader": {}, "mixtures": [{"from": 1}]}', "unreadable"),
        ('{"format_version": 2}', "has format 2, but this version reads 1 to 1"),
    ],
)
def test_another_file_is_named(text: str, told: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3, texts={folders.DATA_STATE: text})
    with pytest.raises(CheckpointError, match=f"data_state.json: {told}"):
        read_data_state(folder)


def test_changes_are_told_source_by_source() -> None:
    before, now = mixture_of(compose(SMOKE), 1), mixture_of(compose([*SMOKE, *OTHER]), 8)
    late = {"late": {"from_step": 9, "weights": {"text": 0.1}, "vision_ratio": None}}
    assert changes(before, now) == [
        "ocr: weight 0.05 -> left out",
        "text: weight 0.6 -> weight 0.3",
        "web: no source -> weight 0.5, at most 2 epochs",
        "vision_ratio None -> 0.2",
        f"schedule {{}} -> {late}",
    ]
    assert changes(before, mixture_of(compose([*SMOKE, "data.sources.text.licence=CC0"]), 8)) == []


def test_mixtures_are_remembered_and_bounded() -> None:
    state = DataState({}, [mixture_of(compose(SMOKE), 1)])
    assert state.with_mixture(mixture_of(compose(SMOKE), 5)) is state
    for step in range(2, 100):
        state = state.with_mixture(Mixture(step, {"text": {"weight": step, "epochs": None}}, None, {}))
    written = json.loads(state.to_text())["mixtures"]
    assert [each["from_step"] for each in written] == list(range(100 - MOST_MIXTURES, 100))

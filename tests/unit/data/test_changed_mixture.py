"""Another mixture from a step on: no source repeats or leaves out anything, and the rest is as it was."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from k25_train.compose.resolve import compose
from k25_train.data.loader import DataLoader
from k25_train.data.mix.plan import StepPlan
from tests.helpers.runs import layout, overrides
from tests.helpers.tiny_shards import write_tiny_shard_set

Pieces = list[tuple[str, int, int]]
"""Sample, first token and length of each piece of a sequence."""
WHOLE: tuple[str, ...] = ()
WITHOUT_OCR = ("~data.sources.ocr", "data.sources.text.weight=0.2", "data.sources.video.weight=0.5")
HALF_VISION = ("data.vision_ratio=0.5", "data.sources.caption.weight=0.01")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("shards"))


def steps_of(
    data: Path, mix: tuple[str, ...], start: int, stop: int, state: Mapping[str, Any]
) -> Iterator[tuple[StepPlan, dict[str, Any]]]:
    """Plans of steps, each with the state behind it as a checkpoint keeps it."""
    config = compose([*overrides(data, data / "run", *layout()), *mix])
    with DataLoader(config.data, config.train, config.model.vision) as loader:
        if start:
            loader.start_from(start, state)
        for step in range(start, stop):
            plan = loader.plan(step)
            yield plan, json.loads(json.dumps(loader.state_after(plan)))


def run(data: Path, parts: list[tuple[tuple[str, ...], int]]) -> list[StepPlan]:
    """Plans of a run that is resumed before each part but the first: mixture and steps of each."""
    plans: list[StepPlan] = []
    state: dict[str, Any] = {}
    for mix, num_steps in parts:
        planned = list(steps_of(data, mix, len(plans), len(plans) + num_steps, state))
        plans += [plan for plan, _ in planned]
        state = planned[-1][1]
    return plans


def pieces_of(plan: StepPlan) -> list[tuple[str, Pieces]]:
    return [
        (sequence.source, [(piece.record.key, piece.start, piece.length) for piece in sequence.pieces])
        for sequence in plan.sequences
    ]


def by_source(plans: list[StepPlan]) -> dict[str, list[Pieces]]:
    """The sequences of each source in the order in which they were served."""
    served: dict[str, list[Pieces]] = {}
    for plan in plans:
        for source, pieces in pieces_of(plan):
            served.setdefault(source, []).append(pieces)
    return served


def test_a_resume_changes_nothing_at_any_step(data: Path) -> None:
    whole = [pieces_of(plan) for plan in run(data, [(WHOLE, 12)])]
    for parts in ([1] * 12, [5, 7]):
        assert [pieces_of(plan) for plan in run(data, [(WHOLE, steps) for steps in parts])] == whole


@pytest.mark.parametrize(
    "parts",
    [
        [(WHOLE, 4), (WITHOUT_OCR, 6), (WHOLE, 5)],
        [(WITHOUT_OCR, 3), (HALF_VISION, 5), (WITHOUT_OCR, 1), (WHOLE, 4)],
    ],
)
def test_each_source_goes_on_where_it_was(parts: list[tuple[tuple[str, ...], int]], data: Path) -> None:
    plans = run(data, parts)
    served, alone = by_source(plans), by_source(run(data, [(WHOLE, 60)]))
    for source, sequences in served.items():
        assert sequences == alone[source][: len(sequences)], source
    # It is the same every time, and the mixture is in force from its first step on.
    assert [pieces_of(plan) for plan in run(data, parts)] == [pieces_of(plan) for plan in plans]
    first = 0
    for mix, num_steps in parts:
        if mix == WITHOUT_OCR:
            assert "ocr" not in by_source(plans[first : first + num_steps])
        first += num_steps


def test_what_came_before_does_not_weigh_on_the_new_mixture(data: Path) -> None:
    """Shares hold from the change on: a source that served much before is not held back for it."""
    mostly_text = ("data.sources.text.weight=100",)
    plans = run(data, [(mostly_text, 12), (WHOLE, 12)])
    tokens = dict.fromkeys(("text", "caption", "ocr", "video"), 0)
    for plan in plans[12:]:
        for source, of in plan.served().items():
            tokens[source] += of.num_tokens
    assert tokens["text"] / sum(tokens.values()) == pytest.approx(0.6, abs=0.04)


def test_without_a_state_the_steps_are_planned_again(data: Path) -> None:
    whole = run(data, [(WHOLE, 9)])
    for plan, _ in steps_of(data, WHOLE, 7, 9, {}):
        assert pieces_of(plan) == pieces_of(whole[plan.step])


def test_going_on_costs_the_same_at_any_step(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from k25_train.data.mix.stream import SourceStream

    packed: list[int] = []
    pack = SourceStream._pack_window
    monkeypatch.setattr(
        SourceStream,
        "_pack_window",
        lambda stream, *of, **last: packed.append(of[0]) or pack(stream, *of, **last),
    )
    ((_, state),) = steps_of(data, WHOLE, 0, 1, {})
    at_first, million = len(packed), 1_000_000
    late = {name: {**position, "epoch": million, "window": 0} for name, position in state["sources"].items()}
    packed.clear()
    ((plan, after),) = steps_of(
        data, WHOLE, million, million + 1, {**state, "step": million, "sources": late}
    )
    assert plan.step == million and after["step"] == million + 1
    # The first windows of all sources when they are opened, those where they are, and the ones behind.
    assert len(packed) <= at_first + 2 * len(late) and {*packed} <= {0, million, million + 1}

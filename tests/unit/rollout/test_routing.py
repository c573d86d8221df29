"""Turns of a response go to the engine that has it in its cache, while that makes sense."""

import pytest

from k25_train.rollout.engines import routing
from k25_train.rollout.engines.routing import SLACK, Load, Routes, response_of


def test_turns_stay_where_the_response_is() -> None:
    routes = Routes()
    idle, busy = Load(0, 0), Load(0, SLACK)
    assert routes.choose("a#1", {0: busy, 1: idle}) == 1
    assert routes.choose("a#1, turn 1", {0: idle, 1: busy}) == 1
    assert routes.choose("a#2", {0: idle, 1: busy}) == 0
    # It is too busy, it fails, it does not serve: each moves it, and there it stays.
    assert routes.choose("a#1, turn 2", {0: idle, 1: Load(0, SLACK + 1)}) == 0
    assert routes.choose("a#1, turn 3", {0: busy, 1: idle}) == 0
    assert routes.choose("a#1, turn 4", {0: Load(1, 0), 1: busy}) == 1
    assert routes.choose("a#1, turn 5", {0: idle}) == 0
    assert (routes.num_kept, routes.num_moved) == (2, 3)


def test_keys_name_responses() -> None:
    assert response_of("a, turn b#1f") == "a, turn b#1f"
    assert response_of("a, turn b#1f, turn 12") == "a, turn b#1f"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "REMEMBERED", 2)
    routes = Routes()
    for number in range(3):
        routes.choose(str(number), {0: Load(0, 0)})
    assert routes.choose("0, turn 1", {0: Load(0, 1), 1: Load(0, 0)}) == 1
    assert routes.choose("2, turn 1", {0: Load(0, 1), 1: Load(0, 0)}) == 0

"""A run ends, whatever its engines do."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k25_train.rl import room as room_module
from k25_train.rl.event_loop import EventLoop
from k25_train.rl.room import Room
from k25_train.rollout.journal import Journal, read_state
from k25_train.rollout.journal_state import admitted
from k25_train.rollout.trajectory import Group, Response
from tests.helpers.scripted_rollouts import algorithm_config, rollout_config


def test_an_engine_that_does_not_end_keeps_no_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "END_S", 0.05)
    config: Any = SimpleNamespace(
        algorithm=algorithm_config(),
        rollout=rollout_config(),
        model=SimpleNamespace(vocab_size=256),
        run=SimpleNamespace(dir=str(tmp_path)),
    )

    async def never() -> None:
        await asyncio.Event().wait()

    parts: Any = SimpleNamespace(pool=None, workplace=None, tasks=None, close=never)
    checkpoints: Any = tmp_path
    told: list[str] = []
    room = Room(config, EventLoop(), parts, checkpoints, told.append)
    room.journal = Journal(tmp_path / "journal")
    room.journal.append(
        admitted(Group(number=0, task="t", epoch=0, version=0, stamp={}, responses=[Response()]))
    )
    room.end()
    assert told == ["warning: engines or judges did not end within 0.05 s"]
    assert read_state(tmp_path / "journal").num_admitted == 1

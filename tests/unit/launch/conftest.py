"""What tests of `launch` share: a job of scripts, and a recorded node."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from tests.helpers.recorded_node import RecordedNode
from tests.helpers.scripted_job import ScriptedJob


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedJob]:
    """A job on four sound nodes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield ScriptedJob(tmp_path, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def config() -> Config:
    """The report's job."""
    return compose(["experiment=k25_pretrain_4k"])


@pytest.fixture
def recorded(tmp_path: Path) -> RecordedNode:
    """A sound node."""
    return RecordedNode(tmp_path)

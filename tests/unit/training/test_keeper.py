"""A verdict counts for the checkpoint whose weights its step began with, however long that takes to write."""

import errno
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from k25_train.checkpoint.records import Committed
from k25_train.training.keeper import CheckpointKeeper
from k25_train.training.soundness import Verdict
from tests.helpers.small_saves import one_rank

SOUND, SKIPPED = Verdict(), Verdict("its gradient was not finite", was_skipped=True)
RUINED = Verdict("its loss was 99 nats", weights_were_ruined=True)


class ScriptedSaver:
    """Goes on twice with each save, as a real one does."""

    is_local, shared = False, "shared"

    def __init__(self) -> None:
        self.step, self._is_written = 0, False
        self.reasons: list[str] = []

    def begin(self, where: object, step: int, **_: object) -> None:
        self.step, self._is_written = step, False

    def go_on(self, why: str, *, gives_up: bool) -> tuple[Committed, str] | None:
        self.reasons.append(why)
        if not self._is_written:
            self._is_written = True
            return None
        step, self.step = self.step, 0
        return Committed(Path(f"step_{step}"), self.reasons[-2]), "cheap"

    def waiting(self) -> Any:
        return nullcontext()


@pytest.fixture
def keeper() -> Iterator[CheckpointKeeper]:
    made: Any = object.__new__(CheckpointKeeper)
    with (
        mock.patch("k25_train.training.keeper.Saver", return_value=ScriptedSaver()),
        mock.patch("k25_train.training.keeper.data_of_a_new_run"),
    ):
        config = SimpleNamespace(checkpoint=SimpleNamespace(interval_steps=4, interval_s=0, local_dir=None))
        run = SimpleNamespace(config=config, is_main=True, checkpoints=Path("checkpoints"))
        made.__init__(run, mock.Mock(), mock.Mock(losses=[]))
    made._kept = mock.Mock()
    yield made


def steps(keeper: CheckpointKeeper, verdicts: list[Verdict], *, is_slow: bool) -> list[Any]:
    """Save step 4, then train these steps; what became of checkpoints."""
    keeper.begin(4, SOUND)
    for verdict in verdicts:
        keeper.learn(verdict)
        keeper.go_on(is_busy=is_slow, has_failed=False)
    keeper.finish()
    changes = ("prove", "set_aside", "prune_unsound")
    return [call for call in keeper._kept.mock_calls if call[0] in changes]  # type: ignore[attr-defined]


PROVED = mock.call.prove(4)
ASIDE = mock.call.set_aside(4, "the next step showed that its weights are bad: its loss was 99 nats")


@pytest.mark.parametrize(
    ("verdicts", "is_slow", "expected"),
    [
        ([SOUND], True, [PROVED]),
        ([SOUND, RUINED], True, [PROVED]),
        ([SKIPPED, SOUND, RUINED], True, [PROVED]),
        # Complete before a verdict: the first that is one counts, and no later one.
        ([SKIPPED, SKIPPED, SOUND, RUINED], False, [PROVED]),
        ([SKIPPED, SKIPPED, RUINED, SOUND], False, [ASIDE]),
        ([SKIPPED, SKIPPED], False, []),
        # Written, and not complete: it gets its name, and loses it.
        ([SKIPPED, RUINED, SOUND], False, [ASIDE]),
        # Not written yet: it is set aside as it is completed.
        ([RUINED, SOUND], True, [mock.call.prune_unsound()]),
    ],
)
def test_the_first_step_taken_from_its_weights_decides(
    keeper: CheckpointKeeper, verdicts: list[Verdict], is_slow: bool, expected: list[Any]
) -> None:
    assert steps(keeper, verdicts, is_slow=is_slow) == expected


def test_a_shared_place_that_cannot_be_listed_costs_a_local_save_alone(keeper: CheckpointKeeper) -> None:
    broken = OSError(errno.EIO, "Input/output error")
    with one_rank(), mock.patch("k25_train.checkpoint.folders.newest_checkpoint", side_effect=broken):
        keeper.begin_local(6)
    keeper.report.notice.assert_called_once_with(  # type: ignore[attr-defined]
        "step 6 is not kept on the nodes' disks, and the run goes on: [Errno 5] Input/output error"
    )
    assert keeper.saver.step == 0

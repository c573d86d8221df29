"""Changes of the folder of checkpoints, behind training: what fails is told, and ends nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from k25_train.joining.claim import NoClaim
from k25_train.training.kept import KeptCheckpoints


def kept_by(rank: int, root: Path) -> tuple[KeptCheckpoints, list[str]]:
    """Those of a run, and what it tells."""
    told: list[str] = []
    phases = mock.MagicMock()
    run: Any = SimpleNamespace(
        is_main=rank == 0,
        checkpoints=root,
        claim=NoClaim(),
        tracker=phases,
        config=SimpleNamespace(checkpoint=SimpleNamespace(keep=1, keep_every=0)),
    )
    return KeptCheckpoints(run, SimpleNamespace(notice=told.append)), told  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("a client's own")])
def test_whatever_fails_is_told_and_later_changes_go_on(error: Exception, tmp_path: Path) -> None:
    """Rank 0 alone would end by it, and the others wait."""
    (tmp_path / "step_2").mkdir()
    kept, told = kept_by(0, tmp_path)
    with mock.patch("k25_train.checkpoint.folders.prune", side_effect=error):
        kept.prove(2)
        kept.settle()
    kept.prove(2)
    kept.settle()
    assert told == [f"{tmp_path}: old checkpoints could not be tidied up ({error})"]
    assert (tmp_path / "step_2/proven").exists()


def test_other_ranks_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "step_2").mkdir()
    kept, told = kept_by(1, tmp_path)
    kept.prove(2)
    kept.settle()
    assert not told and not list((tmp_path / "step_2").iterdir())

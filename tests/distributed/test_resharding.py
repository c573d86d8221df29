"""A run goes on in another layout as if it had never been interrupted: the next five losses, to 1e-5.

`make resharding` runs all pairs of layouts, with both optimizers.
"""

from pathlib import Path

import pytest

from tests.helpers.interrupted_runs import SHORT, assert_close, cut_off, short_run
from tests.helpers.ranks import run_ranks
from tests.helpers.resharding import PAIRS, SMOKE, Layout, all_changes, changes
from tests.helpers.runs import fit

pytestmark = pytest.mark.distributed

ADAMW = "optim=adamw"
SETTINGS = {"muonclip": (), "adamw": (ADAMW, "train.dtype=float32")}


class Finished:
    """Runs that were not interrupted, each trained once."""

    def __init__(self, data: Path, root: Path) -> None:
        self._data, self._root = data, root

    def folder(self, layout: Layout, optimizer: str) -> Path:
        """The folder of the run in a layout, with checkpoints at steps 5 and 10."""
        folder = self._root / f"{optimizer}_{'_'.join(map(str, layout))}"
        if not folder.exists():
            self.train(folder, layout, optimizer)
        return folder

    def train(self, folder: Path, layout: Layout, optimizer: str) -> None:
        """Train to the end, from what is in the folder."""
        command = short_run(self._data, folder, *layout.overrides, *SETTINGS[optimizer])
        run_ranks(fit, layout.num_ranks, command, timeout_s=300.0)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(data, tmp_path_factory.mktemp("resharding"))


def test_the_pairs_have_every_change_of_every_setting() -> None:
    assert set(all_changes()) - changes(PAIRS) == set()
    assert {name for name, *_ in changes(PAIRS)} == set(Layout._fields)


def test_pipeline_and_decoupled_tower_go_on_as_ranks_that_share_sequences(
    data: Path, run_as_smoke: Path, finished: Finished, tmp_path: Path
) -> None:
    saved, loaded = PAIRS[0]
    assert saved == SMOKE
    resumed = cut_off(run_as_smoke, tmp_path / "run")
    finished.train(resumed, loaded, "muonclip")
    assert_close(resumed, run_as_smoke, after=SHORT.saved_at)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " to ".join(str(tuple(each)) for each in pair))
def test_every_change_goes_on(
    pair: tuple[Layout, Layout], optimizer: str, finished: Finished, tmp_path: Path
) -> None:
    saved, loaded = pair
    whole = finished.folder(saved, optimizer)
    resumed = cut_off(whole, tmp_path / "run")
    finished.train(resumed, loaded, optimizer)
    assert_close(resumed, whole, after=SHORT.saved_at)

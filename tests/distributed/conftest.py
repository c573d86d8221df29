"""What the multi-rank tests share: one tiny shard set, and runs to compare with."""

from pathlib import Path

import pytest

from tests.helpers.interrupted_runs import FOUR_RANKS, ONE_RANK, short_run
from tests.helpers.parity import Parity
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import fit
from tests.helpers.tiny_shards import write_tiny_shard_set


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shard set."""
    return write_tiny_shard_set(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def parity(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    """Losses of layouts and of one process."""
    return Parity(data, tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="session")
def run_alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished short run of one process, with checkpoints at steps 5 and 10."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(fit, 1, short_run(data, folder, *ONE_RANK))
    return folder


@pytest.fixture(scope="session")
def run_as_smoke(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on 4 ranks with pp=2, vpp=2, ep=2, as `experiment=smoke`."""
    folder = tmp_path_factory.mktemp("as_smoke")
    run_ranks(fit, 4, short_run(data, folder, *FOUR_RANKS))
    return folder

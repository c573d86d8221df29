"""Losses of k25-eval against those that transformers computes from the exported checkpoint, by token."""

from pathlib import Path

import pytest

from k25_train.convert.__main__ import main as convert
from k25_train.errors import ConfigError
from k25_train.eval import read_arguments
from tests.helpers.exported_run import ExportedRun, evaluate_alone, export_run
from tests.helpers.hf_losses import TOLERANCE, Agreement, compare_losses, join
from tests.helpers.interrupted_runs import ONE_RANK, short_run
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(data: Path, run_alone: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedRun:
    checkpoint = run_alone / "checkpoints/step_10"
    return export_run(checkpoint, data / "tokenizer.json", tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def losses(run: ExportedRun) -> Agreement:
    return join(batch for _, batch in compare_losses(run.folder, run.dump))


@pytest.mark.parametrize("with_media", [False, True], ids=["text", "images and video"])
def test_every_token_has_the_loss_that_transformers_gives_it(losses: Agreement, with_media: bool) -> None:
    found = losses.of_documents(with_media=with_media)
    assert found.ours.numel() > 50
    assert found.ours.std() > 0.1, "losses that are all alike would hide a difference"
    assert found.largest <= TOLERANCE


def test_an_import_is_evaluated_without_a_run(
    run: ExportedRun, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exported folder, imported, has the losses of the checkpoint on the data that are named."""
    imported = tmp_path / "imported"
    assert convert(["import", str(run.folder), str(imported), "--dtype", "float32", "--workers", "1"]) == 0
    with pytest.raises(
        ConfigError, match=r"is an import, which says nothing of data\n  -> .*experiment=NAME"
    ):
        read_arguments([f"checkpoint={imported}"])
    arguments = short_run(data, tmp_path / "run", *ONE_RANK)
    [found] = run_ranks(evaluate_alone, 1, str(imported), *arguments)
    [expected] = run_ranks(evaluate_alone, 1, str(run.checkpoint))
    assert found == expected

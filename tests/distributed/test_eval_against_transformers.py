"""Losses of k25-eval against those that transformers computes from the exported checkpoint, by token."""

from pathlib import Path

import pytest

from tests.helpers.exported_run import export_run
from tests.helpers.hf_losses import TOLERANCE, Agreement, compare_losses, join

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def losses(data: Path, run_alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Agreement:
    checkpoint = run_alone / "checkpoints/step_10"
    run = export_run(checkpoint, data / "tokenizer.json", tmp_path_factory.mktemp("exported"))
    return join(batch for _, batch in compare_losses(run.folder, run.dump))


@pytest.mark.parametrize("with_media", [False, True], ids=["text", "images and video"])
def test_every_token_has_the_loss_that_transformers_gives_it(losses: Agreement, with_media: bool) -> None:
    found = losses.of_documents(with_media=with_media)
    assert found.ours.numel() > 50
    assert found.ours.std() > 0.1, "losses that are all alike would hide a difference"
    assert found.largest <= TOLERANCE

"""Checkpoints whose saved configuration is of an earlier version are evaluated, and runs go on from them."""

import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import yaml

from k25_train.compose.migrations import MIGRATIONS, VERSION_KEY, Fill
from tests.helpers.interrupted_runs import ONE_RANK, SHORT, assert_goes_on, cut_off, rows, short_run
from tests.helpers.old_checkpoints import OLD, fit_with_old_files, write_oldest_manifest
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit

pytestmark = pytest.mark.distributed

AS_BEFORE = (*ONE_RANK, "optim=adamw", "dep.mode=coupled", "optim.max_skipped_steps=0")
"""What the first version could do: AdamW and a coupled tower, without offload, overlap or skipped steps."""


def age(run: Path) -> None:
    """Put checkpoints of the first format in the place of a run's: their configurations have no version, and
    lack every key that files without one may lack."""
    shutil.rmtree(run / "checkpoints")
    (run / OLD).rename(run / "checkpoints")
    for folder in (run / "checkpoints").glob("step_?"):
        values = yaml.safe_load((folder / "config.yaml").read_text())
        del values[VERSION_KEY]
        for step in MIGRATIONS[0]:
            if isinstance(step, Fill) and step.key != "dep.mode":
                *path, name = step.key.split(".")
                section = values
                for part in path:
                    section = (section or {}).get(part)
                if section is not None:
                    section.pop(name, None)
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        (folder / "data_state.json").unlink()
        write_oldest_manifest(folder, int(folder.name.split("_")[1]))


def evaluate_and_listen(_context: RankContext, checkpoint: str) -> tuple[dict[str, float], str]:
    """Losses as `k25_train.eval` computes them, and what is printed."""
    from k25_train.eval import evaluate, read_arguments

    printed = StringIO()
    with redirect_stdout(printed):
        losses = evaluate(*read_arguments([f"checkpoint={checkpoint}"]))
    return losses, printed.getvalue()


def fit_from_file(context: RankContext, file: str, overrides: Sequence[str]) -> None:
    """Train as `--config FILE` does."""
    from k25_train.compose.resolve import load

    config = load(Path(file), overrides).config
    with mock.patch("k25_train.compose.resolve.compose", lambda _: config):
        fit(context, [])


def test_an_old_checkpoint_is_evaluated_and_goes_on(data: Path, tmp_path: Path) -> None:
    finished = tmp_path / "finished"
    run_ranks(fit_with_old_files, 1, short_run(data, finished, *AS_BEFORE))
    resumed = cut_off(finished, tmp_path / "resumed")
    shutil.rmtree(resumed / OLD / f"step_{SHORT.num_steps}")
    age(resumed)
    checkpoint = resumed / f"checkpoints/step_{SHORT.saved_at}"

    ((losses, printed),) = run_ranks(evaluate_and_listen, 1, str(checkpoint))
    run_ranks(fit_from_file, 1, str(checkpoint / "config.yaml"), [f"run.dir={resumed}"])

    row = rows(finished)[SHORT.saved_at]
    assert losses == pytest.approx({name: row[name] for name in losses}, rel=1e-6)
    for key in (
        "activation",
        "optim.muon",
        "cluster.slurm",
        "train.stall_timeout_s",
        "model.latent_norm_eps",
    ):
        assert f"{checkpoint}/config.yaml: {key}: " in printed, key
    assert f"{checkpoint} was saved without checksums: the content of its files was not checked" in printed
    assert f"{checkpoint} was saved without facts of the data: whether they changed is not known" in printed
    assert_goes_on(resumed, finished, after=SHORT.saved_at)

"""A trained checkpoint, its dumped evaluation and its exported folder, for others to compute the same."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from k25_train.convert.__main__ import main as convert
from tests.helpers.interrupted_runs import ONE_RANK, short_run
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit
from tests.helpers.tiny_shards import write_tiny_shard_set


@dataclass(frozen=True, slots=True)
class ExportedRun:
    """Where everything is."""

    checkpoint: Path
    dump: Path
    folder: Path


def train_briefly(work: Path, *changes: str) -> tuple[Path, Path]:
    """Train a shrunk model for ten steps in one process; its last checkpoint, and its tokenizer."""
    data = write_tiny_shard_set(work / "shards")
    run_ranks(fit, 1, short_run(data, work / "run", *ONE_RANK, *changes))
    return work / "run/checkpoints/step_10", data / "tokenizer.json"


def export_run(checkpoint: Path, tokenizer: Path, work: Path) -> ExportedRun:
    """Evaluate a checkpoint with `dump` in one process, and export it in float32, both below `work`."""
    run = ExportedRun(checkpoint, work / "dump", work / "exported")
    run_ranks(evaluate_alone, 1, str(checkpoint), f"dump={run.dump}")
    words = f"export {checkpoint} {run.folder} --tokenizer {tokenizer} --dtype float32 --workers 1"
    assert convert(words.split()) == 0
    return run


def evaluate_alone(context: RankContext, checkpoint: str, *arguments: str) -> dict[str, float]:
    """Held-out losses of a checkpoint as `k25-eval` finds them in one process."""
    os.environ.update(context.environment())
    from k25_train.eval import evaluate, read_arguments

    return evaluate(*read_arguments([f"checkpoint={checkpoint}", *arguments]))

"""Losses of k25-eval against those that transformers computes from the exported checkpoint, token by token.

    python -m tests.bench.eval_vs_transformers [CHECKPOINT [--tokenizer FILE]]

Without a checkpoint, a shrunk model is trained for ten steps on generated texts, images and videos. The
checkpoint is evaluated with `dump`, exported in float32, loaded by transformers from the exported folder,
and every dumped batch is computed again. Ends with 1 if a token's loss differs by more than the bar.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.helpers.exported_run import export_run, train_briefly
from tests.helpers.hf_losses import TOLERANCE, compare_losses, join


def main() -> int:
    """Compare, print a table and the figure; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder step_N of a run")
    parser.add_argument("--tokenizer", type=Path, default=Path("datasets/smoke/tokenizer.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint, tokenizer = options.checkpoint, options.tokenizer
        if checkpoint is None:
            checkpoint, tokenizer = train_briefly(work)
        run = export_run(checkpoint.resolve(), tokenizer.resolve(), work)
        batches = dict(compare_losses(run.folder, run.dump))
    together = join(batches.values())
    kinds = {"documents of text": together.of_documents(with_media=False)}
    kinds["documents with media"] = together.of_documents(with_media=True)
    table = Table("", "tokens", "mean loss", "largest difference", "of the means")
    for name, batch in (batches | kinds).items():
        figures = (f"{figure:.1e}" for figure in (batch.largest, batch.of_mean))
        table.add_row(name, f"{batch.ours.numel():,}", f"{batch.ours.mean().item():.4f}", *figures)
    Console().print(table)
    print(f"largest difference of a token's loss: {together.largest:.1e} nats, bar {TOLERANCE:g}")
    return int(not together.largest <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

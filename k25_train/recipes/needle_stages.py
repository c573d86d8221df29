"""The searches for needles of a chain: behind the stages that it names, each once."""

import json
import sys
from pathlib import Path

from k25_train.recipes.chain import Chain
from k25_train.recipes.composed import Composed
from k25_train.recipes.jobs import run_job
from k25_train.recipes.needle import NeedleScore
from k25_train.recipes.running import Say, StageError

RESULT = "needle_{length}.json"
"""In a stage's run folder."""


def search_needles(chain: Chain, stage: Composed, say: Say) -> None:
    """Search what the last checkpoint of a stage finds, at each length that has no result yet.

    Raises StageError if a search fails.
    """
    needles = chain.needles
    if needles is None or stage.stage.name not in needles.after:
        return
    for length in needles.lengths:
        out = result_of(stage, length)
        if out.exists():
            continue
        say(f"needles in {length:,} tokens, {stage.stage.name}:")
        partial = out.with_suffix(".partial")
        command = [
            *(sys.executable, "-m", "k25_train.recipes.needle"),
            *(
                f"checkpoint={stage.last_checkpoint}",
                f"length={length}",
                f"data={needles.data}",
                f"out={partial}",
            ),
            *needles.overrides,
        ]
        if status := run_job(command):
            raise StageError(
                f"the search for needles behind stage {stage.stage.name} failed with status {status}"
            )
        partial.rename(out)


def result_of(stage: Composed, length: int) -> Path:
    """Where the result of a search is."""
    return Path(stage.config.run.dir) / RESULT.format(length=length)


def read_scores(chain: Chain, stage: Composed) -> dict[int, NeedleScore]:
    """Length -> what was found by the last checkpoint of a stage; those that there are."""
    lengths = chain.needles.lengths if chain.needles else ()
    found = {length: result_of(stage, length) for length in lengths}
    return {
        length: NeedleScore.of(json.loads(path.read_text(encoding="utf-8")))
        for length, path in found.items()
        if path.exists()
    }

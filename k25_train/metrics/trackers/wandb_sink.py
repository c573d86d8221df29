"""Weights & Biases (wandb 0.31) as a sink. Whose key it is, and offline mode, are the library's own affair:
WANDB_API_KEY, WANDB_MODE=offline."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k25_train.config.metrics import WandbConfig
from k25_train.metrics.sinks import Row, number
from k25_train.metrics.trackers.run_ids import RunId
from k25_train.metrics.trackers.scalars import scalars_of

INIT_TIMEOUT_S = 60.0
STEP = "train_step"
"""The figure over which the others are drawn: the library's own steps must not go back, as those of a resumed
run do."""


class WandbSink:
    """Logs rows to a run of Weights & Biases, the same one for as long as the run folder is the same."""

    rows_per_flush = 1

    def __init__(self, folder: Path, config: WandbConfig, described: Mapping[str, Any]) -> None:
        """Start or go on with the run; takes seconds, and raises what the library raises.

        Args:
            folder: of the run; its name is that of the run there.
            config: where it is.
            described: configuration to show with it.
        """
        import wandb  # type: ignore[import-not-found, unused-ignore]

        kept = RunId(folder, "wandb", f"{config.entity or ''}/{config.project}")
        name = kept.load() or secrets.token_hex(4)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=name,
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=dict(described),
            # Nothing but metrics: neither what is printed nor the command line or code.
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                init_timeout=INIT_TIMEOUT_S,
            ),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        kept.save(name)

    def write(self, row: Row) -> None:
        """Log a row; the library sends it from a process of its own."""
        self._run.log({**scalars_of(row), STEP: number(row["step"])})

    def flush(self) -> None:
        """Nothing: the library keeps on disk what it could not send yet."""

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()

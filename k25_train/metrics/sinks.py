"""Where a run's metrics go: `metrics.jsonl`, one object per step, and TensorBoard. Only rank 0 makes sinks.

A row is a flat mapping with `step`, the number of finished optimizer steps (0 is the evaluation before the
first), and any of: loss, grad_norm, lr, tokens, text_tokens, vision_tokens, images, patches, step_time_s,
tokens_per_s, flops; with QK-Clip max_logit, heads_clipped and the list max_logits, one per layer; with a
decoupled encoder the fields of `parallel.dep.stats.VisionSummary`, each behind `vision_`; with offloaded
activations those of `parallel.activations.offload.OffloadStats`, the largest of any rank, behind `offload_`;
and at evaluations eval_text_loss and eval_caption_loss.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from k25_train.errors import K25Error

Value = float | int | None
Row = Mapping[str, Value | Sequence[Value]]
"""One step's metrics; read back from a file, None in place of a number that was not finite."""

EVAL_PREFIX = "eval_"


class Sink(Protocol):
    """Takes one row per step, in order."""

    def write(self, row: Row) -> None:
        """Take one step's metrics."""

    def close(self) -> None:
        """Finish; nothing may be written after."""


class JsonlSink:
    """Appends one JSON object per step, flushed at once, so that a killed run keeps all it reached.

    Floats are written so that reading gives the same bits; infinities and NaN, which JSON lacks, as null.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Open for writing from `first_step` on; a resumed run drops what an earlier one wrote from there."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_rows_from(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append a row. Raises K25Error where the disk does not take it."""
        try:
            self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise K25Error(
                f"{self.path}: cannot write metrics ({error}); make room or set run.dir"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Writes scalars for TensorBoard: `train/loss`, `eval/text_loss`, of lists `max_logits/00`, and so on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open an event file whose readers forget steps from `first_step` on that an earlier run wrote."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needs torch

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, row: Row) -> None:
        """Add a row's scalars."""
        for key, value in row.items():
            if isinstance(value, Sequence):
                for index, element in enumerate(value):
                    self._writer.add_scalar(f"{key}/{index:02d}", element, row["step"])
            elif key != "step" and value is not None:
                is_eval = key.startswith(EVAL_PREFIX)
                tag = f"eval/{key.removeprefix(EVAL_PREFIX)}" if is_eval else f"train/{key}"
                self._writer.add_scalar(tag, value, row["step"])

    def close(self) -> None:
        """Write what is pending and close."""
        self._writer.close()


def number(value: Value | Sequence[Value]) -> float:
    """The value, NaN for None. Raises TypeError for a list."""
    if isinstance(value, Sequence):
        raise TypeError(f"{value!r} is a list of metrics, not one")
    return math.nan if value is None else value


def is_finite(value: Value) -> bool:
    """Whether a value is a number that JSON has."""
    return value is not None and math.isfinite(value)


def _finite(row: Row) -> dict[str, object]:
    """The row with None for what JSON does not have."""

    def finite(value: Value) -> Value:
        return value if is_finite(value) else None

    return {
        key: [finite(element) for element in value] if isinstance(value, Sequence) else finite(value)
        for key, value in row.items()
    }


def read_rows(path: Path) -> list[Row]:
    """All rows of a `metrics.jsonl`, but a last line that a kill cut short."""
    return [row for _, row in parsed_lines(path)]


def parsed_lines(path: Path) -> list[tuple[str, Row]]:
    """The lines of a `metrics.jsonl` with their rows; a last line that a kill cut short is left out."""
    found: list[tuple[str, Row]] = []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for index, line in enumerate(lines, start=1):
        try:
            found.append((line, json.loads(line)))
        except json.JSONDecodeError as error:
            raise K25Error(f"{path}, line {index}: not a JSON object ({error}); remove the line") from error
    return found


def drop_rows_from(path: Path, first_step: int) -> None:
    """Remove the rows of `first_step` and later; other lines stay as they are, to the byte."""
    if not path.exists():
        return
    kept = [line for line, row in parsed_lines(path) if number(row["step"]) < first_step]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(scratch, path)

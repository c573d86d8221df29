"""Imports of Hugging Face folders without the command around them."""

from pathlib import Path
from typing import Any

import torch

from k25_train.convert.importing import Options
from k25_train.convert.mapping import Named


def options_of(source: Path, out: Path, **changed: Any) -> Options:
    """Options of an import, as the command's defaults."""
    values: dict[str, Any] = {
        "source": source,
        "out": out,
        "model": None,
        "dtype": torch.bfloat16,
        "named": Named(),
        "memory_bytes": 2**33,
        "num_workers": 1,
        "node": 0,
        "num_nodes": 1,
    }
    return Options(**values | changed)


class Silent:
    """Shows nothing of an import's progress."""

    def start(self, total: int, done: int) -> None: ...

    def show(self, done: int) -> None: ...

    def stop(self) -> None: ...

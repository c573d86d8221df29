"""An engine that keeps a digest of each tensor it is given, instead of generating."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Digests = dict[str, tuple[str, tuple[int, ...], str]]
"""Name -> number format, shape and hash."""


def digests(stream: Iterable[Any]) -> Digests:
    """Digests of named tensors, in order."""
    import torch

    return {
        each.name: (
            str(each.tensor.dtype),
            tuple(each.tensor.shape),
            hashlib.sha256(each.tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest(),
        )
        for each in stream
    }


def of_folder(folder: Path) -> Digests:
    """Digests of the tensors of safetensors files."""
    from safetensors.torch import load_file

    from k25_train.export.stream import NamedTensor

    return digests(
        NamedTensor(name, tensor)
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    )


class RecordingEngine:
    """What a pool needs of an engine; `committed` is what it would sample from."""

    def __init__(self, name: str = "recorder", fails_at: int = -1) -> None:
        """`fails_at`: a version that it does not take when it is first asked."""
        self.name = name
        self.staged: tuple[int, Digests] = (-1, {})
        self.committed: tuple[int, Digests] = (-1, {})
        self.is_paused = False
        self._fails_at = fails_at

    async def stage(self, tensors: Any, version: int) -> None:
        from k25_train.rollout.engines.base import EngineError

        if version == self._fails_at:
            self._fails_at = -1
            raise EngineError(f"{self.name} answered 500")
        found = of_folder(tensors) if isinstance(tensors, Path) else digests(tensors)
        self.staged = version, found

    async def commit(self, version: int) -> None:
        assert self.staged[0] == version
        self.committed = self.staged

    async def pause(self, mode: Any) -> None:
        self.is_paused = True

    async def resume(self) -> None:
        self.is_paused = False

    async def adopt(self, version: int) -> None:
        """Other ways have left what came with them in `staged`."""
        assert self.is_paused
        self.committed = version, self.staged[1]

    async def close(self) -> None: ...

    async def probe(self, sequences: Sequence[Any]) -> list[np.ndarray]:
        return []

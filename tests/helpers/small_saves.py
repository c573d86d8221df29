"""Saves of a few tensors by one rank in this process, without a model: all of a save but what is saved."""

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from k25_train.checkpoint.files.parts import whole
from k25_train.checkpoint.manifest import Manifest
from k25_train.checkpoint.records import Contents


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Within: this process is a job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def pieces_of(state: dict[str, Tensor]) -> list[Any]:
    """Tensors as the pieces of a rank that has everything."""
    return [
        SimpleNamespace(
            part=whole(name, tensor.dtype, tuple(tensor.shape)), tensor=tensor.view(-1), is_buffer=False
        )
        for name, tensor in state.items()
    ]


def contents(step: int, why_unsound: str = "") -> Contents:
    """What a checkpoint has apart from tensors."""
    manifest = Manifest(step=step, files={}, facts={}, why_unsound=why_unsound)
    return Contents(manifest=manifest, texts={"config.yaml": "train:\n  seed: 7\n"})


class SlowDisk:
    """Holds writes up until it is told to go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    @contextlib.contextmanager
    def __call__(self) -> Iterator["SlowDisk"]:
        """Within: nobody writes a tensor before `may_go_on`."""
        from unittest import mock

        from k25_train.checkpoint.files.writer import PartsWriter

        write, disk = PartsWriter.write, self

        def slow(self: PartsWriter, piece: Tensor) -> None:
            assert disk.may_go_on.wait(60), "nobody let the disk go on"
            write(self, piece)

        with mock.patch.object(PartsWriter, "write", slow):
            try:
                yield self
            finally:
                self.may_go_on.set()

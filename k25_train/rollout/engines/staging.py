"""Weights of a version as a folder of safetensors files in memory that an engine on this host can read."""

import asyncio
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from k25_train.errors import MachineError
from k25_train.export.stream import NamedTensor

SHARED_MEMORY = Path("/dev/shm")
"""Where folders are made: files that are never on a disk."""
FILE_BYTES = 2**28
"""Bytes of tensors that are held at once, and are in a file; a larger tensor is alone."""


async def write_folder(tensors: Iterable[NamedTensor], label: str) -> Path:
    """Write a stream of tensors into a new folder in shared memory; the caller removes it.

    Tensors are taken in the caller's thread, since a stream may communicate, and written in another.

    Args:
        tensors: of the release's names.
        label: part of the folder's name.

    Raises `MachineError` if there is no room.
    """
    root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix=f"k25-{label}-", dir=root))
    try:
        number, held, size = 1, dict[str, torch.Tensor](), 0
        for name, tensor in tensors:
            num_bytes = tensor.numel() * tensor.element_size()
            if held and size + num_bytes > FILE_BYTES:
                await _write(folder, number, held)
                number, held, size = number + 1, {}, 0
            # A copy: the stream may use its memory again for the next one.
            held[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += num_bytes
            await asyncio.sleep(0)
        if held:
            await _write(folder, number, held)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise MachineError(
            f"{folder}: {error}\n  -> weights are handed to engines in shared memory: make {root} larger"
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


async def _write(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    await asyncio.to_thread(save_file, tensors, folder / f"model-{number:05d}.safetensors", {"format": "pt"})

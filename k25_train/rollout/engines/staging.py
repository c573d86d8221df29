"""Weights of a version as a folder of safetensors files in memory that engines on this host can read.

Folders have the number of the process that made them in their names: what one that was killed has left is
removed by the next that starts (`drop_leftovers`).
"""

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from k25_train.errors import MachineError
from k25_train.export.stream import NamedTensor

SHARED_MEMORY = Path("/dev/shm")
"""Where folders are made: files that are never on a disk."""
FILE_BYTES = 2**28
"""Bytes of tensors that are held at once, and are in a file; a larger tensor is alone. Our choice."""
_PREFIX = "k25_weights_"
_OWN = re.compile(rf"{_PREFIX}(\d+)_.*")


class FileWriter:
    """Takes tensors one at a time, and writes a file whenever it holds `file_bytes` of them."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._held: dict[str, Tensor] = {}
        self._num_held = self._number = 0

    def has_room(self, tensor: Tensor) -> bool:
        """Whether a tensor goes to the same file as those that are held."""
        return not self._held or self._num_held + tensor.nbytes <= self._file_bytes

    def take(self, name: str, tensor: Tensor) -> None:
        """Hold a copy: who gives it may use its memory again for the next one."""
        self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._num_held += tensor.nbytes

    def flush(self) -> None:
        """Write what is held. Raises OSError."""
        if not self._held:
            return
        self._number += 1
        save_file(self._held, self._folder / f"model-{self._number:05d}.safetensors", {"format": "pt"})
        self._held, self._num_held = {}, 0


def new_folder(root: Path = SHARED_MEMORY) -> Path:
    """An empty folder of this process in shared memory, or among temporary files where there is none."""
    root = root if root.is_dir() else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}_", dir=root))


def drop_leftovers(root: Path = SHARED_MEMORY) -> None:
    """Remove folders of processes of this host that are gone."""
    for path in root.glob(f"{_PREFIX}*"):
        own = _OWN.fullmatch(path.name)
        if own and not Path(f"/proc/{own[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)


async def write_folder(tensors: Iterable[NamedTensor]) -> Path:
    """Write a stream of tensors of the release's names into a new folder; the caller removes it.

    Tensors are taken in the caller's thread, since a stream may communicate, and written in another.

    Raises `MachineError` if there is no room.
    """
    folder = new_folder()
    writer = FileWriter(folder)
    try:
        for name, tensor in tensors:
            if not writer.has_room(tensor):
                await asyncio.to_thread(writer.flush)
            writer.take(name, tensor)
            await asyncio.sleep(0)
        await asyncio.to_thread(writer.flush)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise no_room(folder, error) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def no_room(folder: Path, error: OSError) -> MachineError:
    """What is raised where weights cannot be written."""
    return MachineError(
        f"{folder}: weights cannot be written: {error}\n  -> shared memory needs room for two versions (in a "
        "container --shm-size); or use another rollout.transport"
    )

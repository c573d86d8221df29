"""safetensors files in shared memory, which all engines of the node read.

    /dev/shm/k25_weights_<pid>_…/version_7/model-00001.safetensors …    written here, read by each engine
                                 version_8/                             the next; then version_7 goes

Two versions are there at once, while engines change from one to the other.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.pool import Weights
from k25_train.rollout.engines.staging import (
    FILE_BYTES,
    SHARED_MEMORY,
    FileWriter,
    drop_leftovers,
    new_folder,
    no_room,
)


class SharedMemory:
    """Writes each version into a folder of its own."""

    def __init__(self, root: Path = SHARED_MEMORY, file_bytes: int = FILE_BYTES) -> None:
        """Removes what dead processes have left below `root`."""
        drop_leftovers(root)
        self.folder = new_folder(root)
        self._file_bytes = file_bytes

    def take(self, stream: Iterable[NamedTensor], version: int) -> Weights:
        """See `WeightTransport`; the folder of the version."""
        folder = self.folder / f"version_{version}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            writer = FileWriter(folder, self._file_bytes)
            for name, tensor in stream:
                if not writer.has_room(tensor):
                    writer.flush()
                writer.take(name, tensor)
            writer.flush()
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise no_room(folder, error) from error
        return folder

    def committed(self, version: int) -> None:
        """See `WeightTransport`."""
        for other in self.folder.glob("version_*"):
            if other.name != f"version_{version}":
                shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        """See `WeightTransport`."""
        shutil.rmtree(self.folder, ignore_errors=True)

"""safetensors files in shared memory, which all engines of the node read.

    /dev/shm/k25_<owner>_<pid>/version_7/model-00001.safetensors …      written here, read by each engine
                               version_8/                               the next; then version_7 goes

Two versions are there at once, while engines change from one to the other. What processes left that were
killed is removed by the next one that starts.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from k25_train.errors import MachineError
from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.pool import Weights

SHARED_MEMORY = Path("/dev/shm")
SHARD_BYTES = 2**30
"""Bytes of a file, and so of what is held at once; our choice."""
_PREFIX = "k25_weights_"


class SharedMemory:
    """Writes each version into a folder of its own."""

    def __init__(self, root: Path = SHARED_MEMORY, shard_bytes: int = SHARD_BYTES) -> None:
        """Removes what dead processes have left below `root`."""
        _drop_leftovers(root)
        self.folder = root / f"{_PREFIX}{os.getpid()}"
        self._shard_bytes = shard_bytes

    def take(self, stream: Iterable[NamedTensor], version: int) -> Weights:
        """See `WeightTransport`; the folder of the version, in the release's form without config.json."""
        tensors = iter(stream)
        folder = self.folder / f"version_{version}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            self._write(folder, tensors)
        except OSError as error:
            for _ in tensors:
                pass
            shutil.rmtree(folder, ignore_errors=True)
            raise MachineError(
                f"{folder}: weights of version {version} cannot be written: {error}. Shared memory needs "
                "room for two versions (in a container --shm-size); or use another rollout.transport"
            ) from error
        return folder

    def committed(self, version: int) -> None:
        """See `WeightTransport`."""
        for other in self.folder.glob("version_*"):
            if other.name != f"version_{version}":
                shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        """See `WeightTransport`."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, folder: Path, tensors: Iterator[NamedTensor]) -> None:
        """Files of up to `shard_bytes`, and the index that says which tensor is in which."""
        places: dict[str, str] = {}
        shard: dict[str, Tensor] = {}
        num_bytes = number = 0

        def flush() -> None:
            nonlocal num_bytes, number
            number += 1
            name = f"model-{number:05}.safetensors"
            save_file(shard, folder / name)
            places.update(dict.fromkeys(shard, name))
            shard.clear()
            num_bytes = 0

        for name, tensor in tensors:
            if shard and num_bytes + tensor.nbytes > self._shard_bytes:
                flush()
            shard[name] = tensor.detach().cpu().contiguous()
            num_bytes += tensor.nbytes
        flush()
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _drop_leftovers(root: Path) -> None:
    """Remove folders of processes that are gone."""
    for path in root.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX)
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)

"""A checkpoint as a folder in the release's form, written by any number of processes and nodes.

```
checkpoint ──► stream of named tensors ──► INT4 ──► OUT.partial/model-00017-of-000064.safetensors
                                                        │ all files are there
                   config.json, index, tokenizer, … ────┴──► fsync ──► rename to OUT
```

A file has its name when it is complete, so the same command goes on behind what is there. Each process holds
one tensor at a time. Whoever sees that no file is missing commits the folder.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from k25_train import int4
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.config.model import ModelConfig, Quantization
from k25_train.errors import CheckpointError
from k25_train.export.files import PlannedFile, index_text, plan_files
from k25_train.export.like import INDEX, ReleasedFolder
from k25_train.export.listing import Contents, WeightFormat, released_tensors
from k25_train.export.stream import Requantize, as_stored, stored_tensors
from k25_train.export.writer import drop_leftovers, is_written, placed, write_file

ORDER = ".export.json"
"""What a folder that is being written is going to be; another export does not go on with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOrder:
    """What is to be written."""

    checkpoint: Path
    """Folder of the checkpoint, of any layout and format."""
    out: Path
    """Folder to make."""
    model: ModelConfig
    """The model of the checkpoint."""
    weights: WeightFormat
    """How weights are stored."""
    contents: Contents
    """With vision or without."""
    shard_gb: float | None
    """Most 10^9 bytes in a file; None splits as the release does."""
    like: Path | None
    """Released folder whose INT4 bytes are kept where weights are unchanged."""
    from_masters: bool
    """Whether to round the optimizer's float32 masters instead of reading weights."""

    @property
    def partial(self) -> Path:
        """Where it is until it is complete."""
        return self.out.with_name(f"{self.out.name}.partial")

    def files(self) -> list[PlannedFile]:
        """All weight files."""
        tensors = released_tensors(self.model, self.contents)
        if self.weights is WeightFormat.float32:
            tensors = (replace(tensor, dtype="float32") for tensor in tensors)
        return plan_files(tensors, self.weights, self.shard_gb)

    def identity(self, checkpoint_id: str) -> str:
        """A text that is the same for processes that write the same."""
        values = {
            "checkpoint": checkpoint_id,
            "weights": self.weights.value,
            "contents": self.contents.value,
            "shard_gb": self.shard_gb,
            "like": None if self.like is None else str(self.like.resolve()),
            "from_masters": self.from_masters,
        }
        return json.dumps(values, indent=1) + "\n"


class FileExport:
    """Writes files of an order in one process."""

    def __init__(self, order: ExportOrder) -> None:
        """Opens the checkpoint. Raises `CheckpointError` if it does not have the tensors of the order."""
        self.order = order
        self.files = order.files()
        self.checkpoint = StoredCheckpoint.open(order.checkpoint)
        self.requantize: Requantize = _plain
        # What was trained as INT4 gets the codes of its forward pass, whatever a released folder has.
        if order.like is not None and order.model.quantization is Quantization.none:
            self.requantize = ReleasedFolder(order.like).requantize

    def write(self, index: int) -> str:
        """Write a file and return its name."""
        file = self.files[index]
        stream = stored_tensors(self.checkpoint, file.tensors, from_masters=self.order.from_masters)
        stored = as_stored(stream, file.tensors, self.order.weights, self.requantize)
        write_file(file, self.order.partial, stored)
        return file.name


def export_folder(
    order: ExportOrder,
    texts: Mapping[str, str],
    *,
    node: int = 0,
    num_nodes: int = 1,
    num_workers: int = 1,
    say: Callable[[str], None] = print,
) -> bool:
    """Write this node's share of the files, and commit the folder if that was the last that was missing.

    Args:
        order: what to write; the same in all processes.
        texts: small files by name; the same in all processes.
        node: number of this node, from 0, among those that write the folder together.
        num_nodes: these.
        num_workers: processes that write at once on this node.
        say: prints a line of progress.

    Returns whether the folder is complete.

    Raises:
        CheckpointError: the folder is there already, or another export is in its place; the checkpoint lacks
            a tensor, or is damaged; a process was killed.
    """
    _prepare(order)
    files = order.files()
    mine = range(node, len(files), num_nodes)
    drop_leftovers(order.partial)
    missing = [index for index in mine if not is_written(files[index], order.partial)]
    if len(missing) < len(mine):
        say(f"{len(mine) - len(missing)} of {len(mine)} files are there already")
    _check_room(order, sum(files[index].num_bytes for index in missing))
    # The largest first, so that no process is left with one at the end.
    missing.sort(key=lambda index: -files[index].num_bytes)
    _write_all(order, missing, num_workers, say)
    left = [file.name for file in files if not is_written(file, order.partial)]
    if left and not order.out.is_dir():
        say(f"{len(left)} files are left to the other nodes; who writes the last one finishes the folder")
        return False
    _commit(order, {**texts, INDEX: index_text(files)})
    return True


_writer: FileExport | None = None
"""Of a process of the pool."""


def _write_all(order: ExportOrder, indices: list[int], num_workers: int, say: Callable[[str], None]) -> None:
    if num_workers <= 1 or len(indices) <= 1:
        writer = FileExport(order) if indices else None
        for number, index in enumerate(indices, 1):
            assert writer is not None
            say(f"{number}/{len(indices)}  {writer.write(index)}")
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(indices)), context, _start, (order,)) as pool:
        futures = [pool.submit(_write_in_pool, index) for index in indices]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                say(f"{number}/{len(indices)}  {future.result()}")
        except BrokenProcessPool as error:
            raise CheckpointError(
                f"{order.partial}: a process that wrote files was killed; the same command goes on, with "
                "fewer --workers if memory was short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(order: ExportOrder) -> None:
    global _writer
    torch.set_num_threads(1)
    _writer = FileExport(order)


def _write_in_pool(index: int) -> str:
    assert _writer is not None
    return _writer.write(index)


def _plain(_name: str, weight: torch.Tensor) -> int4.Int4Weight:
    return int4.requantize(weight)


def _prepare(order: ExportOrder) -> None:
    """Make the folder that is written into, or recognise it."""
    if order.out.exists():
        raise CheckpointError(f"{order.out} is there already; export into another folder, or move it away")
    manifest = (order.checkpoint / "manifest.json").read_bytes()
    identity = order.identity(hashlib.sha256(manifest).hexdigest())
    order.partial.mkdir(parents=True, exist_ok=True)
    path = order.partial / ORDER
    # Another node may begin at the same time: what is there is then its order, under whichever name.
    strangers = [each for each in order.partial.iterdir() if not each.name.startswith(f".{ORDER}.")]
    if strangers and not path.exists():
        raise CheckpointError(f"{order.partial} holds something else; move it away, or export elsewhere")
    if not strangers:
        _begin(path, identity)
    if path.read_text(encoding="utf-8") != identity:
        raise CheckpointError(
            f"{order.partial} was begun by an export of another checkpoint or with other options; repeat "
            "these to go on with it, or move it away"
        )


def _begin(path: Path, identity: str) -> None:
    """Write the order, unless another has done so: the first counts."""
    own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with own.open("w", encoding="utf-8") as file:
        file.write(identity)
        file.flush()
        os.fsync(file.fileno())
    try:
        with suppress(FileExistsError):
            os.link(own, path)
    finally:
        own.unlink(missing_ok=True)


def _check_room(order: ExportOrder, num_bytes: int) -> None:
    free = shutil.disk_usage(order.partial).free
    if free < num_bytes:
        raise CheckpointError(
            f"{order.partial}: {num_bytes:,} bytes are to be written, but {free:,} are free there: make "
            "room, or choose another OUT"
        )


def _commit(order: ExportOrder, texts: Mapping[str, str]) -> None:
    """Add the small files and give the folder its name. Another node may do the same at the same time."""
    try:
        if order.like is not None:
            ReleasedFolder(order.like).copy_small_files(order.partial)
        for name, text in texts.items():
            with placed(order.partial / name) as own:
                own.write_text(text, encoding="utf-8")
        drop_leftovers(order.partial, of_all_nodes=True)
        _sync_folder(order.partial)
        os.rename(order.partial, order.out)
    except FileNotFoundError:
        if not order.out.is_dir():
            raise
    (order.out / ORDER).unlink(missing_ok=True)
    # Files of processes that were killed, or were writing the same when the folder got its name.
    for left_over in order.out.glob(".*"):
        if left_over.suffix.removeprefix(".").isdecimal():
            left_over.unlink(missing_ok=True)
    _sync_folder(order.out.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

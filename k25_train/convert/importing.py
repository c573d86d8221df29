"""An import: planned from headers alone, within a limit of memory, its units shared out."""

import hashlib
import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any, Protocol

import torch

from k25_train.checkpoint import folders
from k25_train.compose.migrations import VERSION, VERSION_KEY
from k25_train.compose.yaml_files import dump
from k25_train.config.leaves import plain_values
from k25_train.convert.hf_config import LANGUAGE_MODEL, TOWER, describe, model_of
from k25_train.convert.hf_files import CONFIG, HfFolder, open_folder, read_bytes
from k25_train.convert.mapping import Named, map_tensors
from k25_train.convert.number_formats import BYTES_PER_ELEMENT, find_weights
from k25_train.convert.partial_import import FINGERPRINT, PartialImport
from k25_train.convert.unit_writer import write_unit
from k25_train.convert.units import UNIT_BYTES, Unit, cut, largest_piece
from k25_train.data.prepare.workers import Workers
from k25_train.errors import CheckpointError

MODEL_FILE = "model.yaml"
"""The model's section in a result, to train with: `model=OUT/model.yaml`."""
MOST_ELEMENTS = 8 * 2**20
"""Of a piece: beyond this nothing gets faster. Our choice."""
LEAST_ELEMENTS = 64 * 2**10
"""Of a piece: below this requests are too many. Our choice."""
WORKER_BYTES = 48 * 2**20
"""What a worker takes in addition to what it has of its parent and to pieces: buffers, the table of hashes,
the allocator's free pages. `tests.bench.import_memory` measures the sum."""
SAMPLE_BYTES, NUM_SAMPLES = 4096, 32
"""Of each file, from its start to its end, by which one model is told from another of the same shapes: one
that was trained further has most of the first one's bytes, norms and routers at either end of a file too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    source: Path
    """Folder of Hugging Face's form."""
    out: Path
    """Checkpoint to make."""
    model: str | None
    """Name in conf/model, or file; None for what config.json says."""
    dtype: torch.dtype
    """Of weights in the result."""
    named: Named
    """What may be left out and missing."""
    memory_bytes: int
    """All processes of this node together."""
    num_workers: int | None
    """Processes; None for as many as cores and memory allow."""
    node: int
    """Which share of the units is this node's."""
    num_nodes: int
    """Shares."""
    unit_bytes: int = UNIT_BYTES
    """Of a unit's file."""


class View(Protocol):
    """Who shows how an import goes on."""

    def start(self, total: int, done: int) -> None:
        """Bytes of this node, of which some were done before."""

    def show(self, done: int) -> None:
        """Bytes that are done."""

    def stop(self) -> None:
        """No more to show."""


class Import:
    """An import of one folder."""

    def __init__(self, options: Options) -> None:
        """Read headers and plan. Raises CheckpointError for anything that could be found wrong by them."""
        self.options = options
        self.folder = open_folder(options.source)
        described = describe(self.folder.config, options.source / CONFIG)
        self.parts = described.parts
        self.model = model_of(described, options.model, options.source / CONFIG)
        weights = find_weights(self.folder.tensors)
        self.mapping = map_tensors(weights, self.model, self.parts, options.dtype, options.named)
        self.units = cut(self.mapping.tensors, options.unit_bytes)
        self._state = PartialImport(options.out, self._identity())

    @property
    def num_bytes(self) -> int:
        """Of the result."""
        return sum(unit.num_bytes for unit in self.units)

    @property
    def own_units(self) -> list[Unit]:
        """Units of this node."""
        return self.units[self.options.node :: self.options.num_nodes]

    def exists(self) -> bool:
        """Whether the result is there already. Raises CheckpointError if something else is."""
        return self._state.is_complete()

    def run(self, view: View, *, restart: bool) -> str:
        """Write this node's units, and the result if all nodes' are there; returns what to say at the end."""
        state = self._state
        state.begin(restart=restart)
        done = state.done(self.own_units)
        todo = [unit for unit in self.own_units if unit.number not in done]
        self._check_room(todo)
        if todo:
            self._write(todo, sum(unit.num_bytes for unit in self.own_units if unit.number in done), view)
        if not state.all_done(self.units):
            # Between this look and its end, another node may have found all done.
            return "complete" if state.is_complete() else "waits for other nodes"
        state.commit(self.units, self._texts(), self._facts())
        return "complete"

    def _write(self, todo: list[Unit], done_bytes: int, view: View) -> None:
        max_elements, num_workers = self._within_memory(len(todo))
        num_heads = self.model.vision.num_attention_heads

        def work(unit: Unit, report: Callable[[int], None]) -> None:
            entry = write_unit(unit, self._state.folder, num_heads, max_elements, report)
            self._state.record(unit, entry)

        # One needs no process of its own; forked ones must not inherit threads of torch.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        workers = Workers(num_workers if num_workers > 1 else 0, work, name="k25-convert")
        view.start(done_bytes + sum(unit.num_bytes for unit in todo), done_bytes)
        try:
            for kind, _, value in workers.run(todo):
                done_bytes += value if kind == "progress" else 0
                view.show(done_bytes)
        finally:
            workers.close()
            view.stop()
            torch.set_num_threads(num_threads)

    def _within_memory(self, num_units: int) -> tuple[int, int]:
        """Elements of a piece and number of workers. Raises CheckpointError if one needs more memory."""
        limit, base = self.options.memory_bytes, resident_bytes()
        least = largest_piece(self.mapping.tensors, LEAST_ELEMENTS) * BYTES_PER_ELEMENT
        cores = len(os.sched_getaffinity(0))
        most = min(num_units, cores if self.options.num_workers is None else self.options.num_workers)
        for num_workers in range(max(most, 1), 0, -1):
            # Each process counts what it shares with its parent as its own.
            num_processes = num_workers + (num_workers > 1)
            each = (limit - base * num_processes) // num_workers - WORKER_BYTES
            if each >= least:
                return max(LEAST_ELEMENTS, min(MOST_ELEMENTS, each // BYTES_PER_ELEMENT)), num_workers
            if self.options.num_workers is not None:
                break
        count = self.options.num_workers or 1
        needed = (base * (count + (count > 1)) + (WORKER_BYTES + least) * count) / 2**30
        raise CheckpointError(
            f"--memory-gib {limit / 2**30:g}: with --workers {count}, {needed:.2f} GiB are needed; allow more"
            + (", or use fewer --workers" if count > 1 else "")
        )

    def _check_room(self, todo: list[Unit]) -> None:
        missing = sum(unit.num_bytes for unit in todo)
        free = disk_usage(self._state.folder).free
        if free < missing:
            raise CheckpointError(
                f"{self.options.out}: {missing:,} bytes are to be written, but {free:,} are free there: make "
                "room, or choose another OUT"
            )

    def _texts(self) -> dict[str, str]:
        section = self._model_section()
        texts = {folders.CONFIG: dump({VERSION_KEY: VERSION, "model": section})}
        if LANGUAGE_MODEL in self.parts:
            note = f"# config.json of {self.options.source.resolve()}; the rest is as in the release.\n"
            texts[MODEL_FILE] = note + dump(plain_values(self.model))
        return texts

    def _model_section(self) -> dict[str, Any]:
        """Keys of the parts that are in the result."""
        values = plain_values(self.model)
        if TOWER not in self.parts:
            del values["vision"]
        return values if LANGUAGE_MODEL in self.parts else {"vision": values["vision"]}

    def _facts(self) -> dict[str, str]:
        return {f"import.{key}" if "." not in key else key: value for key, value in self._identity().items()}

    def _identity(self) -> dict[str, str]:
        """What must be the same for another command to go on with what this one wrote."""
        planned = [
            (
                each.name,
                list(each.shape),
                str(each.dtype),
                [(s.source.name, s.change.name) for s in each.segments],
            )
            for each in self.mapping.tensors
        ]
        options = self.options
        readable = {
            "source": str(options.source.resolve()),
            "weights": _sample(self.folder),
            "model": _digest(self._model_section()),
            "dtype": str(options.dtype).removeprefix("torch."),
            "leave_out": ", ".join(options.named.leave_out),
            "allow_missing": ", ".join(options.named.allow_missing),
        }
        of_content = [value for key, value in readable.items() if key != "source"]
        return readable | {FINGERPRINT: _digest([of_content, planned, options.unit_bytes])}


def resident_bytes() -> int:
    """Memory of this process that is in use, what it shares with others included."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _sample(folder: HfFolder) -> str:
    """A hash of what tensors are where, and of samples spread over every file."""
    digest = hashlib.sha256()
    for name, size in folder.file_bytes.items():
        digest.update(f"{name} {size}".encode())
        last = max(0, size - SAMPLE_BYTES)
        for start in dict.fromkeys(last * number // (NUM_SAMPLES - 1) for number in range(NUM_SAMPLES)):
            digest.update(read_bytes(folder.path / name, start, min(SAMPLE_BYTES, size - start)))
    for tensor in folder.tensors.values():
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.offset}".encode())
    return digest.hexdigest()[:16]


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

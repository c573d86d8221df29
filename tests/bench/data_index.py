"""`python -m tests.bench.data_index`: what opening an index of a billion items costs a node of eight ranks.

The file is sparse: no block of it is allocated but the header's and those that are touched. Each process
opens it, looks at 1,000 items spread over all of it, and reports its time and its own memory (USS, what it
does not share), which are summed; pages of the file that all map are counted once. Then what planning a step
costs (`data_planner.py`). Ends non-zero where a bar is missed.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k25_train.data.formats.index_layout import (
    COLUMNS,
    ShardInfo,
    SourceHeader,
    aligned,
    encode_prefix,
    item_size,
)
from k25_train.data.formats.source_index import SourceIndex
from tests.bench import data_planner

NUM_RANKS, LOOKED_AT = 8, 1_000
MOST_S, MOST_BYTES = 1.0, 200e6
ITEM_COLUMNS = ("offset", "num_bytes", "shard", "text_tokens", "crc32", "first_segment", "first_media")
ITEM_TOKENS = 1_000


class Opened(NamedTuple):
    """What one process measured."""

    opening_s: float
    own_bytes: int
    """Memory that it does not share, more than before it opened."""
    shared_bytes: int
    """Its share of the mapped file's pages that are in memory."""


def write_sparse_index(path: Path, num_items: int) -> None:
    """An index of so many items in 40 bytes each, in a file of a few KB on disk."""
    shard = ShardInfo(name="text.bin", num_bytes=2**62, has_checksums=False)
    fixed = {
        "shard_bytes": np.array([shard.num_bytes], "<u8"),
        "shard_text_end": np.array([len(shard.text())], "<u8"),
        "shard_text": np.frombuffer(shard.text(), np.uint8),
    }
    places, first = {}, 0
    for name in (*ITEM_COLUMNS, "segments", *fixed):
        count = len(fixed[name]) if name in fixed else num_items + COLUMNS[name].per.extra
        places[name] = (first, count)
        first = aligned(first + count * item_size(name))
    header = SourceHeader(
        format="indexed", tokenizer_sha256="0" * 64, num_items=num_items, num_shards=1,
        num_tokens=num_items * ITEM_TOKENS,
    )  # fmt: skip
    prefix = encode_prefix(header, places)
    with open(path, "wb") as file:
        file.write(prefix)
        for name, values in fixed.items():
            file.seek(len(prefix) + places[name][0])
            file.write(values.tobytes())
        file.truncate(len(prefix) + first)


def main() -> int:
    """Measure, print the figures last; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=10**9, help="items of the index (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps that are planned (%(default)s)")
    arguments = parser.parse_args()
    num_items = arguments.items
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sparse.k25index"
        write_sparse_index(path, num_items)
        on_disk = path.stat().st_blocks * 512
        print(
            f"{num_items:,} items, {path.stat().st_size / 1e9:.1f} GB, {on_disk / 1e3:.0f} KB of them on disk"
        )
        context = multiprocessing.get_context("spawn")
        barrier, results = context.Barrier(NUM_RANKS), context.Queue()
        ranks = [context.Process(target=_rank, args=(path, barrier, results)) for _ in range(NUM_RANKS)]
        for rank in ranks:
            rank.start()
        found = [Opened(**results.get()) for _ in ranks]
        for rank in ranks:
            rank.join()
    slowest_s = max(each.opening_s for each in found)
    node_bytes = sum(each.own_bytes + each.shared_bytes for each in found)
    missed, planning = data_planner.measure(arguments.steps)
    print(
        f"opening {num_items:,} items: {slowest_s * 1e3:.1f} ms on the slowest of {NUM_RANKS} processes "
        f"(bar {MOST_S * 1e3:.0f} ms), {node_bytes / 1e6:.1f} MB a node (bar {MOST_BYTES / 1e6:.0f} MB)"
    )
    print(planning)
    return int(missed or slowest_s >= MOST_S or node_bytes >= MOST_BYTES)


def _rank(path: Path, barrier: Any, results: Any) -> None:
    own_before = _memory("")["own"]
    started_s = time.perf_counter()
    index = SourceIndex.open(path, "text")
    opening_s = time.perf_counter() - started_s
    items = np.linspace(0, len(index) - 1, LOOKED_AT).astype(np.int64)
    assert not index.text_tokens[items].any()
    barrier.wait()
    all_memory, of_file = _memory(""), _memory(path.name)
    barrier.wait()
    own = max(all_memory["own"] - of_file["own"] - own_before, 0)
    results.put(Opened(opening_s, own, of_file["share"])._asdict())


def _memory(name: str) -> dict[str, int]:
    """Bytes that this process alone has (USS), and its share of all (PSS), of the mappings of a file or of
    all."""
    found = {"own": 0, "share": 0}
    is_in = not name
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_in = not name or line.endswith(name)
        elif is_in and key == "Pss:":
            found["share"] += 1024 * int(values[0])
        elif is_in and key in ("Private_Clean:", "Private_Dirty:"):
            found["own"] += 1024 * int(values[0])
    return found


if __name__ == "__main__":
    sys.exit(main())

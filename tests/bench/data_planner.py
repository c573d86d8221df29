"""What planning a step costs at the size of a real corpus, and whether it depends on that size.

`python -m tests.bench.data_planner`: 20 sources, half of them with images, of 100,000,000 items each; steps
of 16,384 sequences of 4,096 tokens. Indexes are sparse files that are mapped, so pages are really touched;
the lengths that they lack are made up from the numbers of the items. Times are the processor's, as planning
waits for nothing. Ends with 1 if a step takes 50 ms or more on average, or depends on the number of items.
"""

import argparse
import mmap
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.compose.resolve import compose
from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.decode.items import MediaItem
from k25_train.data.mix.columns import ItemColumns
from k25_train.data.mix.lengths import DocumentLengths, Measured
from k25_train.data.mix.permutation import hashed
from k25_train.data.mix.planner import PlannedSource, Planner
from k25_train.data.mix.state import LoaderState
from k25_train.data.mix.stream import SourceStream
from k25_train.data.mix.windows import Windows

NUM_SOURCES, NUM_SEQUENCES, SEQ_LEN = 20, 16_384, 4_096
MOST_S = 0.050
MOST_RATIO = 1.5
"""Of a step over 1e9 items to one over 1e6: noise, and pages that are not in the cache."""


@dataclass
class SparseColumn:
    """A column of zeros on disk, with made-up values added to what is read of it."""

    mapped: np.ndarray
    low: int
    high: int
    key: int

    def __len__(self) -> int:
        return len(self.mapped)

    def __getitem__(self, items: Any) -> np.ndarray:
        draws = hashed(np.asarray(items, dtype=np.int64), self.key) % np.uint64(self.high - self.low)
        return self.mapped[items].astype(np.int64) + self.low + draws.astype(np.int64)


class Counting:
    """Where the media of items begin: one each."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getitem__(self, items: Any) -> Any:
        return self.count if np.ndim(items) == 0 and items < 0 else items


class Documents:
    """Items of a sparse index."""

    def __init__(self, name: str, columns: ItemColumns, vision: Any) -> None:
        self.name, self.num_items, self.is_cut = name, columns.num_items, not columns.has_media
        self._lengths = DocumentLengths(columns, self._no_record, vision, _tokens_of, num_frame_tokens=2)

    def items(self, positions: np.ndarray) -> np.ndarray:
        return positions

    def measure(self, items: np.ndarray, *, is_first: bool) -> Measured:
        measured = self._lengths.measure(items)
        fits = self.is_cut | (measured.lengths <= SEQ_LEN)
        return replace(measured, lengths=np.where(fits, measured.lengths, 0))

    def nothing_usable(self) -> str:
        return "nothing"

    def _no_record(self, item: int) -> Any:
        raise AssertionError(item)


def _tokens_of(item: MediaItem) -> int:
    return 4 + item.grid_thw.num_tokens


def planner_over(num_items: int, folder: Path) -> Planner:
    """A planner over sources of as many items each."""
    config = compose(["experiment=k25_pretrain_4k", "data=smoke"])
    names = [f"{'image' if number % 2 else 'text'}{number}" for number in range(NUM_SOURCES)]
    sources = {
        name: SourceConfig(format=SourceFormat.indexed, path=name, weight=1.0 + number)
        for number, name in enumerate(names)
    }
    data = replace(config.data, sources=sources, vision_ratio=0.2, schedule={})
    planned = []
    for number, name in enumerate(names):
        documents: Any = Documents(
            name, columns_of(number, num_items, folder / f"{name}-{num_items}"), config.model.vision
        )
        stream = SourceStream(number, documents, Windows(num_items, 0, name, shuffle=True), SEQ_LEN, None)
        planned.append(PlannedSource(stream, bool(number % 2), documents))
    return Planner(planned, data, lambda _step: NUM_SEQUENCES)


def columns_of(number: int, num_items: int, path: Path) -> ItemColumns:
    """Columns of texts of 100 to 1,900 tokens, or of images with captions, in one sparse file."""
    with path.open("wb") as file:
        file.truncate(16 * num_items)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    zeros = np.frombuffer(mapped, dtype=np.uint32).reshape(4, num_items)
    has_media = bool(number % 2)
    media = num_items if has_media else 0

    def column(row: int, low: int, high: int, count: int = num_items) -> Any:
        return SparseColumn(zeros[row][:count], low, high, 4 * number + row)

    return ItemColumns(
        text_tokens=column(0, 20 if has_media else 100, 400 if has_media else 1_900),
        first_media=Counting(num_items) if has_media else None,  # type: ignore[arg-type]
        media_width=column(1, 300, 1_200, media),
        media_height=column(2, 300, 1_200, media),
        media_bytes=column(3, 1, 2, media),
        media_type=np.zeros(1, dtype=np.uint8)[np.zeros(1, dtype=int)] if not media else _Images(),  # type: ignore[arg-type]
        misfits=None,
    )


class _Images:
    def __getitem__(self, media: Any) -> np.ndarray:
        return np.zeros(len(media), dtype=np.uint8)


def step_seconds(num_items: int, num_steps: int) -> tuple[float, float, float]:
    """Seconds of an average step, of the first one, and of the first one behind a far state."""
    with tempfile.TemporaryDirectory() as folder:
        planner = planner_over(num_items, Path(folder))
        started = time.process_time()
        plan, state = planner.plan(LoaderState())
        first_s = time.process_time() - started
        started = time.process_time()
        for _ in range(num_steps):
            plan, state = planner.plan(state)
        mean_s = (time.process_time() - started) / num_steps
        again = planner_over(num_items, Path(folder))
        started = time.process_time()
        again.plan(LoaderState.from_json(state.to_json()))
        resumed_s = time.process_time() - started
        padding = 1 - plan.sizes().num_tokens / NUM_SEQUENCES / SEQ_LEN
    print(
        f"{num_items:>13,} items a source: first step {first_s * 1e3:.0f} ms, mean {mean_s * 1e3:.1f} ms, "
        f"first after a resume {resumed_s * 1e3:.0f} ms; {len(plan.sequences_of.items):,} pieces, "
        f"{len(plan.sequences_of.grids):,} images, padding {padding:.2%}"
    )
    return mean_s, first_s, resumed_s


def main() -> int:
    """Measure, print the figures last; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50, help="steps that are averaged over (%(default)s)")
    missed, figures = measure(parser.parse_args().steps)
    print(figures)
    return int(missed)


def measure(num_steps: int) -> tuple[bool, str]:
    """Whether a bar is missed, and the figures."""
    small_s, _, _ = step_seconds(10**6, num_steps)
    large_s, _, _ = step_seconds(10**9, num_steps)
    mean_s, _, _ = step_seconds(10**8, num_steps)
    figures = (
        f"planning {NUM_SEQUENCES:,} sequences over {NUM_SOURCES} sources of 100,000,000 items: "
        f"{mean_s * 1e3:.1f} ms a step (bar {MOST_S * 1e3:.0f} ms); 1e9 to 1e6: x{large_s / small_s:.2f} "
        f"(bar x{MOST_RATIO})"
    )
    return mean_s >= MOST_S or large_s / small_s >= MOST_RATIO, figures


if __name__ == "__main__":
    sys.exit(main())

"""What a step's batch costs when documents are long: each piece is to cost its own tokens alone.

    python -m tests.bench.long_documents

Sets of documents of 400, 4,000 and 40,000 words with the smoke set's tokenizer; steps of 8 sequences of 256
tokens, shuffled, read without prefetching. `stored` are sets that hold the token counts of texts' parts, as
`ShardWriter` writes them. `first` are sets without, where the first piece of a document encodes all of it;
`later` the same when each document has been met. The bar is for stored and later ones.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.data.formats import shard_writer
from k25_train.data.formats.dataset import write_manifest
from k25_train.data.formats.shard_writer import ShardWriter, TextPart
from k25_train.data.loader import DataLoader
from k25_train.data.tokenizer import load_tokenizer
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import all_words

TOKENIZER = Path("datasets/smoke/tokenizer.json")
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
SIZES = ((2000, 400), (200, 4000), (40, 40_000))
"""Number of documents and words of each."""
NUM_STEPS = 20
REPEATS = 5
BAR = 2.0
"""Most that long documents may cost of what short ones do."""


def write_set(folder: Path, num_documents: int, num_words: int) -> Path:
    """A set of texts of as many words."""
    rng = random.Random(num_words)
    folder.mkdir(parents=True)
    shutil.copy(TOKENIZER, folder)
    tokenizer = load_tokenizer(folder / TOKENIZER.name)
    with ShardWriter(folder / "train-00000.tar", tokenizer.sha256) as writer:
        for number in range(num_documents):
            text = " ".join(rng.choices(WORDS, k=num_words))
            part = TextPart(text=text, num_tokens=len(tokenizer.encode(text)))
            writer.add(f"s{number}", "text", "generated", "CC0-1.0", [part])
    write_manifest(folder, TOKENIZER.name, {"train": ["train-00000.tar"]}, [])
    return folder


def step_times(folder: Path) -> tuple[float, float]:
    """Milliseconds per step: when documents are met for the first time, and later, each step's fastest."""
    config = compose(["experiment=smoke", f"data.dir={folder}", *mix(text=1), "data.prefetch_steps=0"])
    rounds: list[list[float]] = []
    with DataLoader(config.data, config.train, config.model.vision) as loader:
        plans = [loader.plan(step) for step in range(NUM_STEPS)]
        for _ in range(1 + REPEATS):
            rounds.append([])
            for plan in plans:
                started = time.perf_counter()
                loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=False))
                rounds[-1].append((time.perf_counter() - started) * 1000)
            loader.sources["text"].documents.clear()
    first, *others = rounds
    return fmean(first), fmean(map(min, zip(*others, strict=True)))


def main() -> int:
    """Measure and print; 1 if the bar is missed."""
    table = Table("documents", "words", "stored", "first", "later", title="ms per step")
    stored, later = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for num_documents, num_words in SIZES:
            folder = Path(temporary) / f"{num_words}"
            stored.append(step_times(write_set(folder / "stored", num_documents, num_words))[1])
            shard_writer.LONG_TEXT_TOKENS, kept = sys.maxsize, shard_writer.LONG_TEXT_TOKENS
            first, met = step_times(write_set(folder / "plain", num_documents, num_words))
            shard_writer.LONG_TEXT_TOKENS = kept
            later.append(met)
            figures = (f"{value:.1f}" for value in (stored[-1], first, later[-1]))
            table.add_row(f"{num_documents:,}", f"{num_words:,}", *figures)
    Console().print(table)
    worst = max(max(times) / times[0] for times in (stored, later))
    print(f"longest to shortest: {worst:.2f} (bar: at most {BAR})")
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())

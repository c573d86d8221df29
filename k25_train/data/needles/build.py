"""Shard sets to learn retrieval from and to search for needles in, made of the text of another set.

    OUT/lists                short lists, said twice
    OUT/long_lists           longer ones
    OUT/facts_1024           facts in real text of up to so many tokens, with questions at the end
    OUT/facts_4096
    OUT/needles_1024         for the search alone: text of the held-out split, and facts, pairs of a key and
    OUT/needles_4096         a value, that no document that is trained on has

Equal text and options give equal bytes.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from k25_train.data.formats.dataset import Dataset, SourceInfo, load_dataset, write_manifest
from k25_train.data.formats.shard_writer import ShardWriter
from k25_train.data.needles.documents import (
    Fact,
    Part,
    Passages,
    fact_document,
    list_document,
    random_facts,
    text_parts,
)
from k25_train.data.needles.words import Words, is_heldout, words_of
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import DataError

NUM_LISTS, NUM_LONG_LISTS, NUM_FACT_TOKENS, NUM_HELDOUT = 12_000, 1_500, 1_000_000, 32
"""Documents, or tokens, of a set, and held-out documents. Our choice."""
LENGTHS = (256, 1024, 4096)
"""Tokens of the longest documents with facts. Our choice: those of the shrunk stages."""
SHORT, LONG = (4, 11), (11, 100)
"""Words of short and of long lists, from and up to. Our choice."""
SHORTEST, TOKENS_PER_FACT = 64, 20
"""Tokens of the shortest document with facts, and for how many of any it has a fact. Our choice."""
NUM_DEPTHS = 8
"""Needles of a document that is searched, evenly spread over its depth. Our choice."""
SPARE = 8
"""Tokens by which a document is shorter than it may be, for its [BOS] and [EOS] and for cuts in words."""

Make = Callable[[np.random.Generator, str], list[Part]]
"""From a generator and `train` or `heldout` to a document."""


@dataclass(frozen=True, slots=True)
class NeedleOptions:
    """What is made."""

    text: Path
    """Shard set whose text and tokenizer are taken."""
    out: Path
    """Folder of the sets."""
    lengths: tuple[int, ...] = LENGTHS
    """Tokens of the documents with facts."""
    num_searched: int = 16
    """Documents of each length to search in."""


@dataclass(frozen=True, slots=True)
class _Material:
    tokenizer: Tokenizer
    words: Words
    passages: dict[str, Passages]


def build_needles(options: NeedleOptions) -> None:
    """Make all sets; a folder that is there is replaced as a whole. Raises DataError for a set without text
    in both splits, or with a vocabulary of too few whole words."""
    dataset = load_dataset(str(options.text))
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    passages = {split: Passages.of(list(_texts(dataset, split)), tokenizer) for split in ("train", "heldout")}
    for split, found in passages.items():
        if not found.ids:
            raise DataError(f"{options.text}: its split {split} has no text to hide needles in.")
    material = _Material(tokenizer, words_of(tokenizer), passages)
    partial = options.out.with_name(f".{options.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, (make, num_train, num_heldout) in _sets(options, material).items():
        _write(partial / name, dataset.tokenizer_path, material, make, num_train, num_heldout)
    (partial / "words.json").write_text(
        json.dumps({"values": material.words.of_facts, "depths": NUM_DEPTHS}) + "\n", encoding="utf-8"
    )
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)


def _sets(options: NeedleOptions, material: _Material) -> dict[str, tuple[Make, int, int]]:
    """Name -> how a document is made, and how many of both splits there are."""
    every = material.words.every
    sets: dict[str, tuple[Make, int, int]] = {
        "lists": (lambda r, _: list_document(every, int(r.integers(*SHORT)), r), NUM_LISTS, NUM_HELDOUT),
        "long_lists": (
            lambda r, _: list_document(every, int(r.integers(*LONG)), r),
            NUM_LONG_LISTS,
            NUM_HELDOUT,
        ),
    }
    for length in options.lengths:
        num_train = 4 * NUM_FACT_TOKENS // length
        sets[f"facts_{length}"] = (_facts(material, length), num_train, NUM_HELDOUT)
        sets[f"needles_{length}"] = (_needles(material, length), 1, options.num_searched)
    return sets


def _facts(material: _Material, length: int) -> Make:
    """Documents of all lengths up to this one, as many of any length as of twice that."""

    def make(random: np.random.Generator, split: str) -> list[Part]:
        num_tokens = round(np.exp(random.uniform(np.log(SHORTEST), np.log(length - SPARE))))
        count = max(num_tokens // TOKENS_PER_FACT, 1)
        words = material.words.of_facts
        facts = random_facts(words, min(count, len(words) // 2), random)
        depths = np.sort(random.random(len(facts))).tolist()
        asked = random.permutation(len(facts)).tolist()
        return fact_document(material.passages[split], facts, depths, asked, num_tokens, random)

    return make


def _needles(material: _Material, length: int) -> Make:
    """Documents of the whole length with a needle at each depth. A value tells at which depth it was: the
    search sees nothing of a document but the words that it asks for."""
    words = material.words.of_facts

    def make(random: np.random.Generator, split: str) -> list[Part]:
        facts: list[Fact] = []
        for depth in range(NUM_DEPTHS):
            used = {word for fact in facts for word in fact}
            values = [word for word in words[depth::NUM_DEPTHS] if word not in used]
            value = values[random.integers(len(values))]
            keys = [w for w in words if w not in used and w != value and is_heldout(w, value)]
            facts.append((keys[random.integers(len(keys))], value))
        depths = [depth / (NUM_DEPTHS - 1) for depth in range(NUM_DEPTHS)]
        asked = random.permutation(NUM_DEPTHS).tolist()
        return fact_document(material.passages[split], facts, depths, asked, length - SPARE, random)

    return make


def _write(
    folder: Path, tokenizer_path: str, material: _Material, make: Make, num_train: int, num_heldout: int
) -> None:
    folder.mkdir(parents=True)
    name = Path(shutil.copy(tokenizer_path, folder)).name
    splits: dict[str, list[str]] = {}
    for split, count in (("train", num_train), ("heldout", num_heldout)):
        shard = f"{split}-00000.tar"
        with ShardWriter(folder / shard, material.tokenizer.sha256) as writer:
            for number in range(count):
                seed = [number, split == "train", *folder.name.encode()]
                parts = make(np.random.default_rng(seed), split)
                writer.add(
                    f"{split}-{number}",
                    "text",
                    "needles",
                    "that of the text",
                    text_parts(parts, material.tokenizer),
                )
        splits[split] = [shard]
    info = SourceInfo(
        name="needles",
        version="1",
        registry="made",
        licence="that of the text",
        files=2,
        samples=num_train + num_heldout,
    )
    write_manifest(folder, name, splits, [info])


def _texts(dataset: Dataset, split: str) -> Iterator[str]:
    """Texts of the samples that are text alone."""
    for record in dataset.splits[split]:
        if record.kind == "text":
            yield "".join(dataset.reader.read_texts(record))

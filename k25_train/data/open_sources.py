"""Opens the sources of a configuration."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from k25_train.config.data import DataConfig
from k25_train.config.sources import SAMPLE_KINDS, SourceFormat
from k25_train.config.vision import VisionConfig
from k25_train.data.augment.samples import build_augmentation
from k25_train.data.decode.media import MediaReader
from k25_train.data.formats.dataset import Dataset, load_dataset, load_manifest
from k25_train.data.formats.index_prefix import MissingIndexError
from k25_train.data.formats.reader import SourceReader, WordsReader
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.sample_json import Words
from k25_train.data.formats.shards import check_small
from k25_train.data.mix.documents import DocumentBuilder
from k25_train.data.mix.windows import Selection
from k25_train.data.open_source import open_source
from k25_train.data.source_items import IndexItems, Items, RecordItems
from k25_train.data.sources import OpenSource
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.data.zero_vision import NoPixels, check_no_media
from k25_train.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class OpenSources:
    """All of them, with the tokenizer that counted their tokens."""

    tokenizer: Tokenizer
    tokenizer_sha256: str
    sources: dict[str, OpenSource]
    """By name, in the order of `data.sources`."""


def open_sources(data: DataConfig, vision: VisionConfig) -> OpenSources:
    """Open and check every source. Raises DataError for what its files get wrong."""
    # 1. The vocabulary: that of a shard set, unless another is named.
    sets = _ShardSets(data)
    path = _path_of_tokenizer(data, sets)
    tokenizer = load_tokenizer(path)

    # 2. Each by its index; shard sets without one are small and read into memory.
    found = {}
    for name, source in data.sources.items():
        try:
            found[name] = _of_index(name, data, vision, tokenizer)
        except MissingIndexError:
            if source.format is not SourceFormat.shards or source.index is not None:
                raise
            found[name] = _of_set(name, data, vision, tokenizer, *sets.opened(name, tokenizer, path))
    return OpenSources(tokenizer, tokenizer.sha256, found)


def tokenizer_path(data: DataConfig) -> str:
    """Where the vocabulary of a configuration is. Raises `ConfigError` if it has none."""
    return _path_of_tokenizer(data, _ShardSets(data))


def _path_of_tokenizer(data: DataConfig, sets: "_ShardSets") -> str:
    paths = [data.tokenizer, *sets.tokenizer_paths()]
    path = next((path for path in paths if path is not None), None)
    if path is None:
        raise ConfigError(
            "data.tokenizer is null and no source is a shard set, which has one of its own: name the "
            "vocabulary that the sources' tokens were counted with"
        )
    return path


class _ShardSets:
    """Shard sets in memory, once each however many sources are of it."""

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._opened: dict[str, tuple[Dataset, SourceReader]] = {}

    def tokenizer_paths(self) -> list[str]:
        """Of each set among the sources."""
        is_set = [each for each in self._data.sources.values() if each.format is SourceFormat.shards]
        folders = dict.fromkeys(map(self._data.path_of, is_set))
        return [load_manifest(folder).tokenizer_path for folder in folders]

    def opened(self, name: str, tokenizer: Tokenizer, path: str) -> tuple[Dataset, SourceReader]:
        """The set of a source, and what reads it, which keeps what was parsed last. Raises DataError for one
        that is too large for it, or of another vocabulary than that at `path`."""
        folder = self._data.path_of(self._data.sources[name])
        if folder not in self._opened:
            check_small(name, load_manifest(folder))
            dataset = load_dataset(folder, self._data.tokenizer)
            if dataset.tokenizer_sha256 != tokenizer.sha256:
                raise DataError(
                    f"{folder}: its tokens were counted with another vocabulary than that of {path}: build "
                    "it again with this one"
                )
            reader = WordsReader(dataset.reader, partial(_words, dataset), tokenizer)
            self._opened[folder] = dataset, reader
        return self._opened[folder]


def _of_set(
    name: str,
    data: DataConfig,
    vision: VisionConfig,
    tokenizer: Tokenizer,
    dataset: Dataset,
    reader: SourceReader,
) -> OpenSource:
    source = data.sources[name]
    training = _items(dataset, "train", source.kinds)
    heldout = _items(dataset, "heldout", source.kinds)
    augmentation = build_augmentation(data.augment, reader.words, tokenizer.encode)
    limited = data.limit_samples is not None
    return OpenSource(
        name=name,
        place=dataset.directory,
        documents=DocumentBuilder(reader, tokenizer, vision, augmentation=augmentation),
        media_reader=_media_reader(
            name,
            dataset.directory,
            data,
            (training, heldout),
            lambda: MediaReader(reader, vision, data.decoder, augmentation.view),
        ),
        stays_whole=training.columns.has_media,
        num_frame_tokens=2,
        training=training,
        heldout=training if limited else heldout,
        selection=Selection(training.columns.num_items, 0),
        reader=reader,
    )


def _of_index(name: str, data: DataConfig, vision: VisionConfig, tokenizer: Tokenizer) -> OpenSource:
    # 1. One rank holds the files against the index for all.
    source = data.sources[name]
    opened = open_source(name, data, tokenizer, checks_shards=os.environ.get("RANK", "0") == "0")
    index, reader = opened.index, opened.reader
    augmentation = build_augmentation(data.augment, reader.words, tokenizer.encode)
    training = IndexItems(index, *opened.items_of("train"))

    # 2. What is held out: a split of its own, or every n-th item.
    num_items = training.columns.num_items
    if source.heldout and "heldout" in index.header.splits:
        raise DataError(
            f"data.sources.{name}.heldout={source.heldout}, but the names of its files say what is held out: "
            "use 0"
        )
    if 2 * source.heldout > num_items:
        raise DataError(
            f"data.sources.{name}.heldout={source.heldout}, but it has {num_items} items: hold out half of "
            "them at most"
        )
    has_split = "heldout" in index.header.splits and data.limit_samples is None
    heldout = IndexItems(index, *opened.items_of("heldout")) if has_split else training
    return OpenSource(
        name=name,
        place=reader.directory,
        documents=DocumentBuilder(
            reader, tokenizer, vision, frame=index.header.frame, augmentation=augmentation
        ),
        media_reader=_media_reader(
            name,
            reader.directory,
            data,
            (training, heldout),
            lambda: MediaReader(reader, vision, data.decoder, augmentation.view),
        ),
        stays_whole=index.has_media or source.format is SourceFormat.chat,
        num_frame_tokens=2 if index.header.frame else 0,
        training=training,
        heldout=heldout,
        selection=Selection(num_items, source.heldout),
        reader=reader,
    )


def _media_reader(
    name: str, place: str, data: DataConfig, items: Sequence[Items], decoding: Callable[[], MediaReader]
) -> MediaReader:
    """What decodes the media of a source, made by `decoding`. With zero vision nothing does, and a source
    whose `items` have any is refused."""
    if not data.zero_vision:
        return decoding()
    for each in items:
        check_no_media(name, place, each)
    return NoPixels(name)


def _words(dataset: Dataset, record: SampleRecord) -> Sequence[Words]:
    return dataset.reader.read_words(record)


def _items(dataset: Dataset, split: str, kinds: list[str]) -> RecordItems:
    records = dataset.splits.get(split, ())
    return RecordItems([record for record in records if record.kind in (kinds or SAMPLE_KINDS)])

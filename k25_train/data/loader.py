"""Global batches that depend on (seed, step) alone.

`plan(step)` names every sequence of the step from the index, the same on every rank; `micro_batches` reads
and decodes a rank's share of such a plan. Each batch is planned once, by the caller, and its plan travels
with what was read. Sequences go to data-parallel ranks in contiguous blocks, so the global batch is bitwise
the same for any number of ranks and any micro-batch size, and resuming needs nothing but the step.
"""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from k25_train.config.data import DataConfig
from k25_train.config.model import VisionConfig
from k25_train.config.sources import SAMPLE_KINDS, SourceFormat
from k25_train.config.training import TrainConfig
from k25_train.data.batch import MicroBatch, MicroBatchAssembler, Reads
from k25_train.data.decode.decoder import decoder_versions
from k25_train.data.decode.media import MediaReader, Wanted
from k25_train.data.fingerprint import data_facts
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.formats.reader import WordsReader
from k25_train.data.formats.records import SampleRecord
from k25_train.data.micro_batches import read_micro_batches
from k25_train.data.mix.blend import Blend
from k25_train.data.mix.documents import DocumentBuilder
from k25_train.data.mix.plan import SequencePlan, StepPlan
from k25_train.data.mix.stream import KindStream, shuffle_media
from k25_train.data.prefetch import StepPrefetch
from k25_train.data.served import SourceSummary
from k25_train.data.skip_log import SkipLog
from k25_train.data.storage.options import use_options
from k25_train.data.tokenizer import load_tokenizer
from k25_train.data.units import GroupedReading, MediaGroup, ReadHere, Result, Unit, UnitReading, WordsUnit
from k25_train.errors import ConfigError, DataError

EVAL_SEED = 0
"""Seed of the held-out order, the same in every run: shuffled, so that few sequences represent all."""


class DataLoader:
    """Train and held-out batches of one shard set. A context manager: leaving it ends the prefetching."""

    def __init__(
        self, data: DataConfig, train: TrainConfig, vision: VisionConfig, workers: UnitReading | None = None
    ) -> None:
        """Open and check the shard set. Without `workers` this process reads by itself.

        Raises DataError for what `load_dataset` or the samples get wrong.
        """
        self._data = data
        self._train = train
        self._vision = vision
        use_options(data)
        # 1. The shard set, and what reads a rank's share of it.
        self.dataset = load_dataset(_folder_of(data), data.tokenizer)
        self.tokenizer = load_tokenizer(self.dataset.tokenizer_path)
        self.skip_log = SkipLog(data.dir, data.max_skipped_samples)
        reader = WordsReader(self.dataset.reader, self.dataset.reader.read_words, self.tokenizer)
        self._documents = DocumentBuilder(reader, self.tokenizer, vision)
        self.media = MediaReader(self.dataset.reader, vision, data.decoder)
        self._assembler = MicroBatchAssembler(
            documents=self._documents,
            vision=vision,
            seq_len=train.seq_len,
            pad_token=self.tokenizer.pad,
            media_pad=self.tokenizer.media_pad,
            skip_log=self.skip_log,
            sources=list(data.sources),
        )

        self.reading: UnitReading = GroupedReading(workers or ReadHere(self.read_unit), vision)

        # 2. What plans batches: one stream of sequences per kind, and the order of kinds.
        self._blend = Blend(_shares(data))
        self._streams = {
            name: self._build_stream(name, self._records("train", name), train.seed, data.shuffle)
            for name in data.sources
        }
        self._prefetches: list[StepPrefetch[Any]] = []
        self._facts: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the prefetching; what is in the making is finished and dropped."""
        self.dataset.reader.folder.close()
        for prefetch in self._prefetches:
            prefetch.close()

    def facts(self) -> dict[str, str]:
        """What the batches depend on outside the configuration: dotted key -> text, as `data_facts` says.

        Costs seconds per million samples the first time, and nothing later.
        """
        if not self._facts:
            train, heldout = (
                {kind: self._records(split, kind) for kind in self._data.sources}
                for split in ("train", self._heldout_split)
            )
            self._facts = {
                **data_facts(train, heldout, self.dataset.tokenizer_sha256),
                "data.decoder": decoder_versions(self._data.decoder),
            }
        return self._facts

    def summaries(self) -> tuple[SourceSummary, ...]:
        """What each source has, in the order of `data.sources`."""
        return tuple(self._summary(name) for name in self._data.sources)

    def _summary(self, name: str) -> SourceSummary:
        source, records = self._data.sources[name], self._records("train", name)
        return SourceSummary(
            name=name,
            has_media=source.may_have_media,
            num_documents=len(records),
            num_tokens=sum(map(self._documents.num_tokens, records)),
            weight=source.weight,
            max_epochs=source.epochs,
        )

    def prefetch[Result](self, read: Callable[[StepPlan], Result]) -> StepPrefetch[Result]:
        """What `read` makes of the plan of each step; the next `data.prefetch_steps` in a background thread.

        Planning happens in that thread too: let the result carry the plan. Ends with the loader.
        """
        prefetch = StepPrefetch(
            lambda step: read(self.plan(step)), self._data.prefetch_steps, self._train.steps
        )
        self._prefetches.append(prefetch)
        return prefetch

    def plan(self, step: int) -> StepPlan:
        """The global batch of a step (counted from 0), without reading a shard."""
        first = step * self._train.global_batch_size
        numbers = range(first, first + self._train.global_batch_size)
        plan = StepPlan(step=step, sequences=_draw(self._blend, self._streams, numbers))
        self.skip_log.saw(sum(len(sequence.pieces) for sequence in plan.sequences))
        return plan

    def state_after(self, plan: StepPlan) -> dict[str, Any]:
        """Where the loader is after a step."""
        return {"step": plan.step + 1}

    def start_from(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on behind the first `step` steps, where the loader was in `state`."""

    def plan_evaluation(self, num_sequences: int, shuffle_media_seed: int | None = None) -> StepPlan:
        """Fixed held-out sequences, the same every time.

        Half are text and half have media, in the proportions of the blend; where the blend has only one of
        the two, all are. With `data.limit_samples` they are the train samples, which are then meant to be
        memorized. `shuffle_media_seed` gives every sample the image or video of another of its kind
        (`stream.shuffle_media`); as lengths change, the samples may then be packed differently.
        """
        blend = Blend(_eval_shares(_shares(self._data)))
        streams = {kind: self._eval_stream(kind, shuffle_media_seed) for kind in self._data.sources}
        return StepPlan(step=0, sequences=_draw(blend, streams, range(num_sequences)))

    def micro_batches(self, plan: StepPlan, *, dp_rank: int, dp_size: int, reads: Reads) -> list[MicroBatch]:
        """The micro-batches of one data-parallel rank in a planned batch, in order, with what it `reads`.

        Raises ConfigError if the batch does not divide into micro-batches, and DataError as
        `read_micro_batches` does.
        """
        sequences, size = plan.sequences, self._train.micro_batch_size
        if len(sequences) % (dp_size * size):
            raise ConfigError(
                f"{len(sequences)} sequences do not divide into micro-batches of train.micro_batch_size="
                f"{size} on {dp_size} data-parallel ranks: train.global_batch_size and train.eval_sequences "
                f"must be multiples of {dp_size * size}."
            )
        share = len(sequences) // dp_size
        first = dp_rank * share
        batches = [sequences[i : i + size] for i in range(first, first + share, size)]
        return list(read_micro_batches(batches, reads, self.reading, self._assembler, self.skip_log))

    def read_unit(self, unit: Unit) -> Result:
        """Read, tokenise and decode in this process. Raises as `micro_batches`."""
        if isinstance(unit, WordsUnit):
            return self._assembler.assemble(unit.sequences, unit.reads)
        if isinstance(unit, MediaGroup):
            wanted = [Wanted(each.media, each.positions) for each in unit.units]
            return tuple(self.media.load_all(wanted))
        return self.media.load(unit.media, unit.positions)

    @property
    def _heldout_split(self) -> str:
        return "heldout" if self._data.limit_samples is None else "train"

    def _eval_stream(self, kind: str, shuffle_media_seed: int | None) -> KindStream:
        records = self._records(self._heldout_split, kind)
        if shuffle_media_seed is not None:
            records = shuffle_media(records, shuffle_media_seed)
        return self._build_stream(kind, records, EVAL_SEED, shuffle=True)

    def _build_stream(
        self, kind: str, records: Sequence[SampleRecord], seed: int, shuffle: bool
    ) -> KindStream:
        return KindStream(
            kind,
            records,
            documents=self._documents,
            vision=self._vision,
            seq_len=self._train.seq_len,
            seed=seed,
            shuffle=shuffle,
            skip_log=self.skip_log,
        )

    def _records(self, split: str, source: str) -> list[SampleRecord]:
        if split not in self.dataset.splits:
            raise DataError(
                f"{self.dataset.directory}: has no split {split!r}, only "
                f"{', '.join(self.dataset.splits)}. Build the shard set again."
            )
        kinds = self._data.sources[source].kinds or SAMPLE_KINDS
        records = [record for record in self.dataset.splits[split] if record.kind in kinds]
        return records[: self._data.limit_samples]


def _folder_of(data: DataConfig) -> str:
    """The one folder of all sources."""
    places = {data.path_of(source) for source in data.sources.values()}
    if len(places) > 1 or any(source.format is not SourceFormat.shards for source in data.sources.values()):
        raise ConfigError(f"data.sources: only one shard set can be read, not {', '.join(sorted(places))}")
    return places.pop()


def _shares(data: DataConfig) -> dict[str, float]:
    weights = {name: source.weight for name, source in data.sources.items() if source.weight}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _draw(
    blend: Blend, streams: Mapping[str, KindStream], numbers: Sequence[int]
) -> tuple[SequencePlan, ...]:
    located = [blend.locate(number) for number in numbers]
    return tuple(streams[kind].sequence(position) for kind, position in located)


def _eval_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Half for text, half for the media kinds together; all for one of the two where the other is absent."""
    media_total = sum(share for kind, share in shares.items() if kind != "text")
    return {kind: 1.0 if kind == "text" else share / media_total for kind, share in shares.items()}

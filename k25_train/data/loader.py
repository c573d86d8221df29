"""Global batches that depend on (seed, configuration, step) alone.

`plan(step)` names every sequence of the step from the indexes, the same on every rank; `micro_batches` reads
and decodes a rank's share of such a plan. Each batch is planned once, by the caller, and its plan travels
with what was read. Sequences go to data-parallel ranks in contiguous blocks, so the global batch is bitwise
the same for any number of ranks and any micro-batch size. A plan follows from the state behind the one
before; a run that goes on has it from its checkpoint, or plans the steps before once more.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from k25_train.config.data import DataConfig
from k25_train.config.training import TrainConfig
from k25_train.config.vision import VisionConfig
from k25_train.data.augment.draws import keys_of
from k25_train.data.batch import MicroBatch, MicroBatchAssembler, Reads
from k25_train.data.decode.decoder import decoder_versions
from k25_train.data.evaluation_plan import EvaluationPlanner
from k25_train.data.fingerprint import common_facts
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.micro_batches import read_micro_batches
from k25_train.data.mix.mixture import first_weights
from k25_train.data.mix.plan import SequencePlan, StepPlan
from k25_train.data.mix.planner import PlannedSource, Planner
from k25_train.data.mix.state import LoaderState
from k25_train.data.mix.stream import SourceStream
from k25_train.data.mix.windows import Windows
from k25_train.data.open_sources import open_sources
from k25_train.data.prefetch import StepPrefetch
from k25_train.data.served import SourceSummary
from k25_train.data.skip_log import SkipLog
from k25_train.data.sources import OpenSource, training_documents
from k25_train.data.storage.options import use_options
from k25_train.data.units import GroupedReading, ReadHere, Result, Unit, UnitReading
from k25_train.data.units_here import UnitsHere
from k25_train.errors import ConfigError, DataError

MOST_STATES = 64
"""States behind planned steps that are kept, for steps that are asked for once more. Our choice."""


class DataLoader:
    """Train and held-out batches of the sources. A context manager: leaving it ends the prefetching."""

    def __init__(
        self, data: DataConfig, train: TrainConfig, vision: VisionConfig, workers: UnitReading | None = None
    ) -> None:
        """Open and check the sources. Without `workers` this process reads by itself.

        Raises DataError for what the sources or their samples get wrong.
        """
        self._data = data
        self._train = train
        use_options(data)
        # 1. The sources, and what reads a rank's share of them.
        opened = open_sources(data, vision)
        self.tokenizer = opened.tokenizer
        self._tokenizer_sha256 = opened.tokenizer_sha256
        self.sources: Mapping[str, OpenSource] = opened.sources
        """By name, in the order of `data.sources`."""
        self.skip_log = SkipLog(data.max_skipped_samples)
        self._assembler = MicroBatchAssembler(
            vision=vision,
            seq_len=train.seq_len,
            pad_token=self.tokenizer.pad,
            media_pad=self.tokenizer.media_pad,
            skip_log=self.skip_log,
            sources=self.sources,
        )

        self._units = UnitsHere(self.sources, self._assembler)
        self.reading: UnitReading = GroupedReading(workers or ReadHere(self.read_unit), vision)

        # 2. What plans batches. Several threads do.
        self._planner = Planner(
            [self._planned(source, vision) for source in self.sources.values()], data, train.batches.size_of
        )
        self._states: dict[int, LoaderState] = {0: LoaderState()}
        self._lock = threading.Lock()
        self._evaluation = EvaluationPlanner(self.sources, data, train, vision, self.skip_log)
        self._prefetches: list[StepPrefetch[Any]] = []
        self._facts: dict[str, str] = {}

    def _planned(self, source: OpenSource, vision: VisionConfig) -> PlannedSource:
        """A source that has something to learn from. Raises DataError for one that has not."""
        data, seq_len, name = self._data, self._train.seq_len, source.name
        keys = keys_of(data.augment, self._train.seed, name)
        documents = training_documents(source, data.limit_samples, vision, seq_len, self.skip_log, keys)
        if not documents.num_items:
            raise DataError(documents.nothing_usable())
        windows = Windows(documents.num_items, self._train.seed, name, shuffle=data.shuffle)
        stream = SourceStream(
            list(self.sources).index(name), documents, windows, seq_len, data.sources[name].epochs
        )
        # What its first window gets wrong is told before the job costs anything.
        stream.check()
        if not source.training.has_target(data.limit_samples):
            raise DataError(
                f"data.sources.{name}: no text of its {documents.num_items} samples in {source.place} has a "
                "loss: there is nothing to learn from them. Write the set with `loss: true` where words are "
                f"to be learned, or leave it out (~data.sources.{name})."
            )
        return PlannedSource(stream, source.has_media, documents)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the prefetching; what is in the making is finished and dropped."""
        for source in self.sources.values():
            source.reader.close()
        for prefetch in self._prefetches:
            prefetch.close()

    def facts(self) -> dict[str, str]:
        """What the batches depend on outside the configuration (`fingerprint.py`): dotted key -> text."""
        if not self._facts:
            self._facts = common_facts(self._tokenizer_sha256)
            self._facts["data.decoder"] = decoder_versions(self._data.decoder)
            for name, source in self.sources.items():
                self._facts |= source.facts(
                    f"data.train.{name}", f"data.heldout.{name}", self._data.limit_samples
                )
        return self._facts

    def summaries(self) -> tuple[SourceSummary, ...]:
        """What each source has, in the order of `data.sources`."""
        return tuple(self._summary(source) for source in self.sources.values())

    def _summary(self, source: OpenSource) -> SourceSummary:
        config = self._data.sources[source.name]
        num_items = source.num_training(self._data.limit_samples)
        num_heldout = source.num_heldout(self._data.limit_samples)
        return SourceSummary(
            name=source.name,
            has_media=source.has_media,
            num_documents=num_items,
            num_heldout=num_heldout if first_weights(self._data)[source.name] else 0,
            num_tokens=self._planner.tokens_of_epoch(source.name),
            weight=config.weight,
            max_epochs=config.epochs,
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
        """The global batch of a step (counted from 0), without reading a shard.

        Steps in order cost least. Those between the nearest one that is known and this one are planned, too.
        """
        with self._lock:
            state = self._states[max(known for known in self._states if known <= step)]
            while True:
                plan, after = self._planner.plan(state)
                self._keep(after)
                if state.step == step:
                    break
                state = after
        self.skip_log.saw(len(plan.sequences_of.items))
        return plan

    def _keep(self, state: LoaderState) -> None:
        self._states.setdefault(state.step, state)
        for step in list(self._states)[1:-MOST_STATES]:
            del self._states[step]

    def state_after(self, plan: StepPlan) -> dict[str, Any]:
        """Where the loader is after a step that was planned lately."""
        return self._states[plan.step + 1].to_json()

    def start_from(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on behind the first `step` steps, where the loader was in `state`; an empty one is found by
        planning them again. Raises DataError for a state that is none."""
        if state:
            self._states[step] = LoaderState.from_json(state)

    def plan_evaluation(self, num_sequences: int, shuffle_media_seed: int | None = None) -> StepPlan:
        """Fixed held-out sequences, the same every time (`EvaluationPlanner`)."""
        return self._evaluation.plan(num_sequences, shuffle_media_seed)

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
        batches = [tuple(sequences[i : i + size]) for i in range(first, first + share, size)]
        return list(read_micro_batches(batches, reads, self.reading, self._assembler, self.skip_log))

    def read_sequences(self, sequences: Sequence[SequencePlan], reads: Reads) -> list[MicroBatch]:
        """A micro-batch of each of some sequences alone. Raises as `micro_batches`."""
        batches = [(sequence,) for sequence in sequences]
        return list(read_micro_batches(batches, reads, self.reading, self._assembler, self.skip_log))

    def indexes(self) -> dict[str, SourceIndex]:
        """The index of each source, made in memory for shard sets."""
        return {name: source.training.index(self._tokenizer_sha256) for name, source in self.sources.items()}

    def read_unit(self, unit: Unit) -> Result:
        """Read, tokenise and decode in this process. Raises as `micro_batches`."""
        return self._units.read(unit)

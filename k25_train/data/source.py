"""Where the training process gets its inputs from: a process of its own (`reading_process.py`) or itself.

Planning, reading, tokenizing and decoding are Python for the most part: in a thread of the training process
they would hold the lock of its interpreter while it launches kernels. `data.read_in` chooses.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from k25_train.config.schema import Config
from k25_train.data.loader import DataLoader
from k25_train.data.prefetch import StepPrefetch
from k25_train.data.regions import PageLock, leave_pageable
from k25_train.data.served import SourceSummary
from k25_train.data.share_reader import HostInputs, Share, ShareReader
from k25_train.data.skip_log import SkipLog
from k25_train.data.workers.pool import WorkerPool


@dataclass(frozen=True, slots=True)
class Opened:
    """What is known of the data once they are open."""

    vocab_size: int
    """Ids of its tokenizer; every one is smaller."""
    pad: int
    """Id of padding."""
    sources: tuple[SourceSummary, ...]
    """The sources, in the order of their numbers (`MicroBatch.source`)."""


class DataSource(Protocol):
    """Training and held-out batches of one rank. A context manager: leaving it ends all reading.

    `open` comes first, then `take`, then the others, each by one thread.
    """

    @property
    def skip_log(self) -> SkipLog:
        """Counts the samples that cannot be used, and stops the run when they are too many."""

    def open(self) -> Opened:
        """Read and check the index. Raises what `DataLoader` does."""

    def facts(self) -> dict[str, str]:
        """What the batches depend on outside the configuration (`DataLoader.facts`)."""

    def take(self, share: Share, page_lock: PageLock) -> None:
        """Say which part of each batch is this rank's, and how memory shared with another process is
        page-locked."""

    def start_from(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on behind the first `step` steps of a run, before any step is asked for.

        `state` is `HostInputs.state_after` of the last of them; if it is empty, they are planned again.
        Raises `DataError` if it is none.
        """

    def step(self, step: int) -> HostInputs:
        """Inputs of a training step, counted from 0; the next ones are read meanwhile. Raises `DataError`."""

    def evaluation(self, num_sequences: int, shuffle_media_seed: int | None) -> HostInputs:
        """Inputs of the first held-out sequences (`DataLoader.plan_evaluation`). Raises as `step`."""

    def close(self) -> None:
        """End all reading; what is in the making is dropped."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ThreadSource:
    """Reads in this process, steps ahead of use in a thread. For runs of few steps, for platforms other than
    Linux, and for tests that reach into the reading."""

    def __init__(self, config: Config, workers: WorkerPool | None = None) -> None:
        """Nothing is read before `open`. Without `workers` this process reads by itself."""
        self._config = config
        self._workers = workers
        self._open = ExitStack()
        self.loader: DataLoader
        self.reader: ShareReader
        self._steps: StepPrefetch[HostInputs]

    @property
    def skip_log(self) -> SkipLog:
        """The loader's own."""
        return self.loader.skip_log

    def open(self) -> Opened:
        """See `DataSource`."""
        config = self._config
        if self._workers is not None:
            # This process may have been bound to a NUMA node since it was forked.
            self._workers.follow()
        loader = DataLoader(config.data, config.train, config.model.vision, self._workers)
        self.loader = self._open.enter_context(loader)
        tokenizer = self.loader.tokenizer
        return Opened(tokenizer.vocab_size, tokenizer.pad, self.loader.summaries())

    def facts(self) -> dict[str, str]:
        """See `DataSource`."""
        return self.loader.facts()

    def take(self, share: Share, page_lock: PageLock = leave_pageable) -> None:
        """See `DataSource`; no memory is shared."""
        self.reader = ShareReader(self._config, self.loader, share)
        self._steps = self.loader.prefetch(lambda plan: self.reader.step(plan))

    def start_from(self, step: int, state: Mapping[str, Any]) -> None:
        """See `DataSource`."""
        self.loader.start_from(step, state)

    def step(self, step: int) -> HostInputs:
        """See `DataSource`."""
        return self._steps.get(step)

    def evaluation(self, num_sequences: int, shuffle_media_seed: int | None) -> HostInputs:
        """See `DataSource`."""
        return self.reader.evaluation(num_sequences, shuffle_media_seed)

    def close(self) -> None:
        """See `DataSource`."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

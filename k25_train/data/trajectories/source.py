"""Training batches of reinforcement learning: each step is what was rolled out for it, on every rank."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from k25_train.config.schema import Config
from k25_train.data.loader import DataLoader
from k25_train.data.regions import PageLock, leave_pageable
from k25_train.data.served import SourceSummary
from k25_train.data.share_reader import HostInputs, Share, ShareReader
from k25_train.data.skip_log import SkipLog
from k25_train.data.source import Opened
from k25_train.data.trajectories.documents import NAME
from k25_train.data.trajectories.loader import DATA_STATE, TrajectoryLoader

FOLDER = "rollouts"
"""Of the step files, in the run folder."""


def rollouts_of(config: Config) -> Path:
    """Where a run has its step files."""
    return Path(config.run.dir) / FOLDER


class TrajectorySource:
    """A `source.DataSource` of step files, with the sources of `data` to hold out of, and for the next-token
    loss of `algorithm.ptx_coeff`.

    Everything is read by the thread that asks for it: the file of a step is there only when its rollouts are,
    and a rank's part of it takes far less time than they did. So `data.read_in`, `data.workers` and
    `data.prefetch_steps` have no say.
    """

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        """Nothing is read before `open`. `folder`: of the step files; by default where the run has them."""
        self._config = config
        self._folder = folder or rollouts_of(config)
        self._open = ExitStack()
        self._data: DataLoader
        self._loader: TrajectoryLoader
        self._reader: ShareReader

    @property
    def skip_log(self) -> SkipLog:
        """That of `data`: a trajectory is never skipped."""
        return self._data.skip_log

    def open(self) -> Opened:
        """See `DataSource`."""
        config = self._config
        assert config.algorithm is not None
        beside = config.of_batch(config.algorithm.ptx_sequences)
        self._data = self._open.enter_context(DataLoader(config.data, beside.train, config.model.vision))
        self._loader = TrajectoryLoader(config, self._data, self._folder)
        tokenizer = self._data.tokenizer
        rollouts = SourceSummary(
            name=NAME,
            has_media=True,
            num_documents=0,
            num_heldout=0,
            num_tokens=0,
            weight=1.0,
            max_epochs=None,
        )
        return Opened(tokenizer.vocab_size, tokenizer.pad, (*self._data.summaries(), rollouts))

    def facts(self) -> dict[str, str]:
        """See `DataSource`."""
        return self._data.facts()

    def take(self, share: Share, page_lock: PageLock = leave_pageable) -> None:
        """See `DataSource`; no memory is shared."""
        self._reader = ShareReader(self._config, self._loader, share)

    def start_from(self, step: int, state: Mapping[str, Any]) -> None:
        """See `DataSource`. Only `data` has a place to go on from: step files are found by their number."""
        self._data.start_from(step, state.get(DATA_STATE, {}))

    def step(self, step: int) -> HostInputs:
        """See `DataSource`; raises `DataError` also where the file of the step is missing or damaged."""
        return self._reader.step(self._loader.plan(step))

    def evaluation(self, num_sequences: int, shuffle_media_seed: int | None) -> HostInputs:
        """See `DataSource`: of `data`."""
        return self._reader.evaluation(num_sequences, shuffle_media_seed)

    def close(self) -> None:
        """See `DataSource`."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""What a worker does: read units until its reading process is gone."""

import contextlib
import faulthandler
import gc
import logging
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from k25_train.config.schema import Config
from k25_train.data import skip_log
from k25_train.data.channel import Channel
from k25_train.data.loader import DataLoader
from k25_train.data.portable_errors import portable
from k25_train.data.storage.counts import COUNTS
from k25_train.data.units import Result, Unit


@dataclass(frozen=True, slots=True)
class Task:
    """A unit on its way to a worker."""

    number: int
    """Of the unit, for its answer."""
    unit: Unit
    """What is to be read."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a task gave."""

    number: int
    """The task's."""
    result: Result | None
    """What was read."""
    error: Exception | None
    """What was raised instead."""
    skipped: Mapping[str, str]
    """Samples that this worker has found unusable since its last answer."""
    counts: Mapping[str, int]
    """What reading has cost it since then."""


def worker(config: Config) -> Callable[[socket.socket, int], None]:
    """What a worker of a configuration does, for `Nursery`."""

    def work(end: socket.socket, log: int) -> None:
        faulthandler.enable(log)
        torch.set_num_threads(1)
        # The reading process counts them over all workers, says each once, and stops the run.
        logging.getLogger(skip_log.__name__).disabled = True
        data = replace(config.data, max_skipped_samples=sys.maxsize, prefetch_steps=0)
        _answer_all(Channel(end), lambda: DataLoader(data, config.train, config.model.vision))

    return work


def _answer_all(channel: Channel, open_loader: Callable[[], DataLoader]) -> None:
    loader: DataLoader | None = None
    num_told = 0
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            task: Task = channel.receive()
            result, error = None, None
            try:
                if loader is None:
                    loader = open_loader()
                    # It lives as long as the process: looking for garbage in it would take seconds.
                    gc.freeze()
                result = loader.read_unit(task.unit)
            except Exception as raised:  # told to the reading process, which raises it as its own
                error = portable(raised)
            new = {} if loader is None else loader.skip_log.later_than(num_told)
            num_told += len(new)
            channel.send(Done(task.number, result, error, new, COUNTS.take()))

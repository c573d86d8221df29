"""The ranks of a job tell each other something before anything is built; the first one decides for all.

They talk through the job's store, not through collectives, so that the one that disagrees, or is silent, can
be named.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from k25_train.errors import CheckpointError, ConfigError, DataError, K25Error, MachineError
from k25_train.joining.network import PROGRESS_S, say
from k25_train.joining.place import JoinError
from k25_train.joining.words import ranges
from k25_train.run_folder.record import LockedError

READ_S = 10.0
"""Longest time that rank 0 waits for the others to have read an error."""
ANSWER_S = 600.0
"""Longest time that rank 0 waits for a rank to say something that takes no time of itself."""
ERRORS = {
    kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, MachineError, LockedError)
}
"""Errors that ranks share as what they are; others become a `ConfigError`."""


class Council:
    """The ranks of a job, of which the first decides for all."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        """`store` is for this purpose alone; its time limit is the longest time to wait for a decision."""
        self.store = store
        self.rank = rank
        self.world_size = world_size

    def tell(self, topic: str, value: object, limit_s: float = ANSWER_S) -> list[Any]:
        """Say something; rank 0 gets what all said, by rank, the others nothing.

        Raises `JoinError` on rank 0 if some say nothing within `limit_s`; it prints for whom it waits.
        """
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        return self._hear(topic, range(self.world_size), limit_s)

    def ask(self, topic: str, ranks: Sequence[int], value: object) -> list[Any]:
        """Have some ranks say something; rank 0 gets it in their order, the others nothing. Raises as `tell`
        does."""
        if self.rank in ranks:
            self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        return self._hear(topic, ranks, ANSWER_S)

    def _hear(self, topic: str, ranks: Sequence[int], limit_s: float) -> list[Any]:
        if self.rank:
            return []
        keys = [f"{topic}/{rank}" for rank in ranks]
        start_s = time.monotonic()
        while True:
            try:
                self.store.wait(keys, timedelta(seconds=min(PROGRESS_S, limit_s)))
                return [json.loads(text) for text in self.store.multi_get(keys)]
            except dist.DistStoreError:
                silent = [rank for rank, key in zip(ranks, keys, strict=True) if not self.store.check([key])]
            waited_s = time.monotonic() - start_s
            named = f"{len(silent)} of {self.world_size} ranks ({topic}): {ranges(silent)}"
            if silent and waited_s >= limit_s:
                raise JoinError(f"no word from {named}, after {limit_s:g} s: see what their nodes print")
            if silent:
                say(f"waiting for {named}, {waited_s:.0f} of at most {limit_s:g} s")

    def decide(
        self, topic: str, answer: object, error: K25Error | None, limit_s: float = 2 * ANSWER_S
    ) -> Any:
        """Rank 0 gives an answer or an error; every rank gets the answer, or raises the error.

        Raises `JoinError` if rank 0 gives neither within `limit_s`, or has ended.
        """
        if not self.rank:
            kind = None if error is None else type(error).__name__
            of_whom = ("", ()) if error is None else (error.code, error.of_ranks)
            self.store.set(topic, json.dumps([answer, kind, str(error), *of_whom]))
        try:
            self.store.wait([topic], timedelta(seconds=limit_s))
            answer, kind, text, code, of_ranks = json.loads(self.store.get(topic))
        except dist.DistError as trouble:
            raise JoinError(f"rank 0 does not answer ({topic}): see what the first node prints") from trouble
        if kind is not None:
            self._all_have_read(topic)
            failure = ERRORS.get(kind, ConfigError)(text)
            failure.is_shared, failure.code, failure.of_ranks = True, code, tuple(of_ranks)
            raise failure
        return answer

    def _all_have_read(self, topic: str) -> None:
        """Have rank 0 wait until all have the error: the store may be its own, and ends with it."""
        if self.rank:
            self.store.set(f"{topic}/read/{self.rank}", "")
            return
        keys = [f"{topic}/read/{rank}" for rank in range(1, self.world_size)]
        # A rank that has ended by itself does not answer.
        with contextlib.suppress(dist.DistError):
            self.store.wait(keys, timedelta(seconds=READ_S))

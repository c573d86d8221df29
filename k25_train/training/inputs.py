"""What one rank computes on in a step or an evaluation: read by its `DataSource`, agreed on by all ranks.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from k25_train.data.context import context_of
from k25_train.data.served import Served
from k25_train.data.share_reader import Failure, HostInputs
from k25_train.data.source import DataSource
from k25_train.data.step_batches import without_failures
from k25_train.data.storage.counts import COUNTS, PIXELS
from k25_train.errors import DataError, K25Error
from k25_train.plan.batch_sizes import BatchSizes
from k25_train.training.device_batch import DeviceBatch, to_device
from k25_train.training.forward import TokenCounts
from k25_train.training.staging import Staging
from parallel.dep.engine import VisionWork
from parallel.host.upload import upload
from parallel.topology import Topology
from parallel.watchdog.phases import PhaseTracker

_POWER = 64
"""Sums of this power of seconds are about that of the largest, which saves a collective for the maximum. It
is exact where one rank alone is slow, and at most 14% too large where 4,096 are slow alike."""


def slowest_term(wait_s: float) -> float:
    """What a rank adds to the sum; the range of float64 has room for 1e-4 to 1e4 seconds."""
    return float(min(wait_s, 1e4)) ** _POWER


@dataclass(frozen=True, slots=True)
class Inputs:
    """One rank's inputs where the model is."""

    sizes: BatchSizes
    """Of the global batch, the same on every rank."""
    tokens: TokenCounts
    """Of the global batch, without what could not be read."""
    micro_batches: list[DeviceBatch]
    """This replica's micro-batches, or what this rank holds of them, in the order in which they run."""
    served: Mapping[str, Served]
    """What each source has given to the global batch."""
    loader_state: Mapping[str, Any]
    """Where the loader is after it."""
    vision: VisionWork
    """What the decoupled encoder does; nothing with a coupled tower."""
    wait_s: float
    """Seconds that the slowest rank has waited for what it reads (`slowest_term`)."""
    pixels_read: int
    """Pixels that all ranks have decoded since the inputs of the step before were read."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What one rank has read, when all ranks know what could not be read."""

    read: HostInputs
    """Whole micro-batches, without the loss of what any rank could not use."""
    tokens: TokenCounts
    """Of the global batch."""
    wait_s: float
    """Seconds that the slowest rank has waited."""


class InputReader:
    """Takes what this rank has read, agrees on it with the other ranks, and brings to the device what it
    computes on."""

    def __init__(self, data: DataSource, topology: Topology, staging: Staging, tracker: PhaseTracker) -> None:
        self._data = data
        self._topology = topology
        self._staging = staging
        self._tracker = tracker
        self._context = context_of(topology.cp_rank, topology.cp_size)
        self._pixels_read = 0

    def step(self, step: int) -> Inputs:
        """Inputs of a training step, counted from 1; the next ones are read in the background.

        Called by every rank. Raises `DataError`, on every rank, if one of them could not read its share or
        has met too many samples that cannot be used.
        """
        inputs = self.to_device(self._agreed(lambda: self._data.step(step - 1)))
        self._pixels_read = 0
        return inputs

    def evaluation(self, num_sequences: int, shuffle_media_seed: int | None = None) -> Inputs:
        """Inputs of the first `num_sequences` held-out sequences. Called by every rank, and raises as `step`.

        With `shuffle_media_seed` every sample gets another sample's images: the rise of the loss is what the
        model gains from seeing the right ones.
        """
        return self.to_device(self.read_evaluation(num_sequences, shuffle_media_seed))

    def read_evaluation(self, num_sequences: int, shuffle_media_seed: int | None = None) -> Agreed:
        """The same in host memory, where micro-batches are whole."""
        return self._agreed(lambda: self._data.evaluation(num_sequences, shuffle_media_seed))

    def _agreed(self, read: Callable[[], HostInputs]) -> Agreed:
        result, num_failures, counts, wait_s = self._agree(read)
        if num_failures:
            # What other ranks could not use has no loss here either. One may have met too many by this.
            own = result
            result, _, counts, _ = self._agree(lambda: self._without_failures(own))
        return Agreed(result, TokenCounts(*counts), wait_s)

    def _agree(self, read: Callable[[], HostInputs]) -> tuple[HostInputs, int, list[int], float]:
        """What `read` gives, if it succeeds on every rank; and of all ranks, the samples that could not be
        used, the token counts, and the seconds of the slowest.

        One collective tells all of it. Otherwise all raise before any waits for another, at the same step,
        and can save.
        """
        results: list[HostInputs] = []
        failures: list[K25Error] = []
        started = time.perf_counter()
        try:
            results.append(read())
        except K25Error as error:
            failures.append(error)
        num_failed, num_failures, num_pixels, *counts, wait_s = self._sum_over_ranks(
            results, time.perf_counter() - started
        )
        self._pixels_read += int(num_pixels)
        if num_failed:
            raise self._error_of(failures)
        return results[0], int(num_failures), [int(count) for count in counts], wait_s

    def to_device(self, agreed: Agreed) -> Inputs:
        """Move what this rank holds of its micro-batches to the device; pixels of the decoupled encoder
        follow when their chunk is encoded."""
        read = agreed.read
        chunks = read.vision.chunks
        held = self._context.held(read.batches)
        batches = held.tensors()
        staged = self._staging.stage([*batches, *(chunk.pixels for chunk in chunks)])
        pixels = staged[len(batches) :]
        vision = replace(
            read.vision,
            chunks=[chunk._replace(pixels=own) for chunk, own in zip(chunks, pixels, strict=True)],
        )
        moved = to_device(held.with_tensors(staged[: len(batches)]), self._topology.device)
        return Inputs(
            sizes=read.sizes,
            tokens=agreed.tokens,
            micro_batches=moved,
            served=read.served,
            loader_state=read.state_after,
            vision=vision,
            wait_s=agreed.wait_s,
            pixels_read=self._pixels_read,
        )

    def _sum_over_ranks(self, results: Sequence[HostInputs], wait_s: float) -> list[float]:
        """Over all ranks: those that could not read, samples that could not be used, pixels that were
        decoded; over replicas, from one rank of each: tokens with a loss, and all tokens; last the seconds of
        the slowest rank."""
        topology = self._topology
        # Of all that was decoded for what has arrived by now, even if it is not used in the end.
        num_pixels = COUNTS.take((PIXELS,)).get(PIXELS, 0)
        own: list[float] = [1, 0, num_pixels, 0, 0]
        for read in results:
            own = [0, len(read.failures), num_pixels, 0, 0]
            # Ranks that share micro-batches have all read them whole.
            if topology.holds_first_chunk and topology.cp_rank == 0:
                own[3:] = read.batches.num_with_loss, read.batches.num_tokens
        # float64 counts exactly what a global batch of 67M tokens can have.
        own.append(slowest_term(wait_s))
        summed = upload(torch.tensor(own, dtype=torch.float64), topology.device)
        with self._tracker.phase("agree on inputs", range(topology.world_size)):
            dist.all_reduce(summed)
            *found, of_slowest = summed.tolist()
        return [*found, of_slowest ** (1 / _POWER)]

    def _error_of(self, failures: Sequence[K25Error]) -> K25Error:
        """What to raise once any rank could not read: the own error, or the name of the highest such rank.
        Called by every rank."""
        failed = torch.tensor(self._topology.rank if failures else -1, device=self._topology.device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        rank = int(failed.item())
        other = DataError(f"rank {rank} could not read its share of the data; its own message says why")
        other.of_ranks = (rank,)
        return failures[0] if failures else other

    def _without_failures(self, read: HostInputs) -> HostInputs:
        """The inputs without the loss of what any rank could not use.

        Every rank counts the samples of items that the encoders could not decode, so that all stop together
        when there are too many (`DataError`); the first rank logs them.
        """
        topology = self._topology
        by_rank: list[tuple[Failure, ...]] = [()] * topology.world_size
        dist.all_gather_object(by_rank, read.failures)
        failures = [failure for of_rank in by_rank for failure in of_rank]
        counted = {(*each[:3], each.sample, each.reason) for each in failures if each.sample}
        for *_, sample, reason in sorted(counted):
            self._data.skip_log.add_named(str(sample), str(reason), log=topology.rank == 0)
        own = [failure for failure in failures if failure.replica == topology.dp_rank]
        items = _by_micro_batch((each.micro_batch, each.item) for each in own)
        documents = _by_micro_batch((each.micro_batch, each.document) for each in own)
        return replace(read, batches=without_failures(read.batches, items, documents))


def _by_micro_batch(failures: Iterable[tuple[int, int | None]]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for micro_batch, position in failures:
        if position is not None:
            found.setdefault(micro_batch, set()).add(position)
    return found

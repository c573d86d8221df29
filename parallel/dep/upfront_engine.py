"""One rank's part in the three phases of a step with a decoupled encoder (K2.5 report, section 4.5.1).

    engine.start(work)              1. balanced vision forward, features to the first stages
    engine.leaf(micro_batch) …      2. the backbone's schedule, unchanged, takes the features of a micro-batch
    engine.finish()                 3. gradients back to the encoders, vision recompute and backward

The engine owns what one step has: its plan, pixels, features and gradients.
"""

from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from parallel.dep.engine import Engine, EngineSetup, VisionWork
from parallel.dep.feature_exchange import Posted
from parallel.dep.feature_store import FeatureStore
from parallel.dep.part_exchange import PartEncoder, PartExchange
from parallel.dep.stats import VisionStats
from parallel.dep.vision_pass import Encode, encode, recompute_and_backward


@dataclass(slots=True)
class _Step:
    """State of the current step."""

    work: VisionWork
    """Plan of the global batch and this rank's pixels."""
    store: FeatureStore
    """Features that this rank takes in the first stage, later their gradients."""
    sent_before: int
    """Bytes that the exchange of features had sent before the step."""
    split_before: int
    """Bytes that the exchange of parts had sent before the step."""
    stats: VisionStats = field(default_factory=VisionStats)
    """What this rank has done in the step."""
    features_in_flight: deque[tuple[int, Posted[Tensor | None]]] = field(default_factory=deque)
    """(micro-batch, transfer of its features), in order."""
    gradients_in_flight: deque[tuple[int, Posted[dict[int, Tensor]]]] = field(default_factory=deque)
    """(micro-batch, transfer of its gradients), in order."""
    num_gradients_posted: int = 0
    """Leading micro-batches whose gradients were posted."""
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """Part -> gradient [n, D] that was received and not yet used."""


class UpfrontEngine(Engine):
    """Runs the encoder of this rank before and after the pipeline."""

    def __init__(self, setup: EngineSetup, encoder: PartEncoder, part_exchange: PartExchange) -> None:
        """`encoder` is this rank's replica; its parameters collect gradients if it is trained."""
        super().__init__(setup)
        self._encoder = encoder
        self._part_exchange = part_exchange
        self._step: _Step | None = None

    def start(self, work: VisionWork) -> None:
        """Encode this rank's chunks and bring all features to the first stages. Called by every rank."""
        # 1. A step's state; ranks that exchange something meet before any of them is busy.
        store = FeatureStore(self._device, self._max_feature_bytes)
        self._step = step = _Step(work, store, self._exchange.sent_bytes, self._part_exchange.sent_bytes)
        self._stats = step.stats
        step.stats.num_patches = sum(chunk.pixels.shape[0] for chunk in work.chunks)
        self._exchange.connect(work.transfers)

        # 2. Chunk after chunk. Transfers whose features are there travel while the next chunk is encoded.
        waiting = deque(self._last_chunks(work))
        own: dict[int, Tensor] = {}
        with self._phase("vision forward"), self._stopwatch.timed("exposed_s"):
            for number in range(-1, len(work.chunks)):
                if number >= 0:
                    with self._stopwatch.timed("forward_s"):
                        features = encode(self._encoder_of(number), work.chunks[number], self._device)
                    own |= zip(self._parts(number), features.split(self._sizes(number)), strict=True)
                while waiting and waiting[0] <= number:
                    waiting.popleft()
                    self._post_features(step, len(step.work.transfers) - len(waiting) - 1, own)

            # 3. The rest of what is in flight.
            while step.features_in_flight:
                self._receive_features(step)
        self._record_sizes()

    def _last_chunks(self, work: VisionWork) -> Iterator[int]:
        """For each micro-batch this rank's last chunk with a part of it or of an earlier one; -1 if none.

        Chunks that are parts of split items are all encoded before the first transfer is posted: a rank that
        waits for features would hold up the other ranks of its next item, and those the ranks that wait for
        their features.
        """
        num_split = sum(self._encoder_of(number) is not self._encoder for number in range(len(work.chunks)))
        last = [num_split - 1] * work.num_micro_batches
        for number in range(len(work.chunks)):
            for part in self._parts(number):
                last[work.micro_batch_of(part)] = number
        return accumulate(last, max)

    def _post_features(self, step: _Step, micro_batch: int, own: MutableMapping[int, Tensor]) -> None:
        """Post a transfer, once those in flight leave space on the device; takes its parts out of `own`."""
        while _num_bytes(step.features_in_flight) > self._max_feature_bytes - step.store.device_bytes:
            self._receive_features(step)
        transfer = step.work.transfers[micro_batch]
        step.features_in_flight.append((micro_batch, self._exchange.post_features(transfer, own)))
        # The transfer holds copies of what it sends: free the features themselves.
        sent = [rows for (sender, _), rows in transfer.items() if sender == self._exchange.rank]
        for part in {each.part for rows in sent for each in rows}:
            del own[part]

    def _receive_features(self, step: _Step) -> None:
        """Wait for the oldest transfer of features, and keep what a first stage receives."""
        micro_batch, posted = step.features_in_flight.popleft()
        with self._stopwatch.timed("exchange_s"):
            received = posted.wait()
        if received is not None:
            step.store.put(micro_batch, received)

    def before_pass(self, num_done: int) -> None:
        """Do nothing: the pipeline runs as without images."""

    def leaf(self, micro_batch: int) -> Tensor | None:
        """The features [v, D] of a micro-batch, brought back from host memory if they were there."""
        step = self._current_step()
        if not self._has_items(micro_batch):
            return None

        def collect(gradient: Tensor) -> None:
            step.store.put(micro_batch, gradient)

        return self._make_leaf(step.store.take(micro_batch), collect)

    def finish(self) -> None:
        """Bring gradients to the encoders, recompute and go backward. Called by every rank."""
        step = self._current_step()
        if self._is_trained:
            with self._phase("vision backward"), self._stopwatch.timed("exposed_s"):
                for number, chunk in enumerate(step.work.chunks):
                    self._bring_gradients(step, self._gradients_until(step.work, number))
                    gradient = torch.cat([step.gradients.pop(part) for part in self._parts(number)])
                    with self._stopwatch.timed("backward_s"):
                        recompute_and_backward(self._encoder_of(number), chunk, gradient)
                # Gradients that this rank sends but does not need.
                self._bring_gradients(step, step.work.num_micro_batches)
            self._record_sizes()
        self.release()

    def _gradients_until(self, work: VisionWork, chunk: int) -> int:
        """Number of leading micro-batches whose gradients a chunk needs: all, if ranks wait for one another
        in the backward pass itself."""
        if work.plan.is_split:
            return work.num_micro_batches
        return 1 + max(work.micro_batch_of(part) for part in self._parts(chunk))

    def _bring_gradients(self, step: _Step, until: int) -> None:
        """Wait for the transfers before micro-batch `until`; post as many more as fit on the device."""
        # Later transfers travel while this rank computes, as far as they fit.
        while step.num_gradients_posted < step.work.num_micro_batches:
            has_space = _num_bytes(step.gradients_in_flight) <= self._max_feature_bytes
            if not has_space and step.num_gradients_posted >= until:
                break
            if not has_space:
                self._receive_gradients(step)
            else:
                self._post_gradients(step, step.num_gradients_posted)
                step.num_gradients_posted += 1
        while step.gradients_in_flight and step.gradients_in_flight[0][0] < until:
            self._receive_gradients(step)

    def _post_gradients(self, step: _Step, micro_batch: int) -> None:
        own = step.store.take(micro_batch) if self._has_items(micro_batch) else None
        posted = self._exchange.post_gradients(step.work.plan, step.work.transfers[micro_batch], own)
        step.gradients_in_flight.append((micro_batch, posted))

    def _receive_gradients(self, step: _Step) -> None:
        """Wait for the oldest transfer of gradients."""
        with self._stopwatch.timed("exchange_s"):
            step.gradients |= step.gradients_in_flight.popleft()[1].wait()

    def release(self) -> None:
        """Release pixels and features. Called by `finish`; an evaluation, which does not finish, calls it."""
        self._step = None

    def _current_step(self) -> _Step:
        assert self._step is not None, "call start first"
        return self._step

    def _has_items(self, micro_batch: int) -> bool:
        """Whether this rank takes features of the micro-batch."""
        return self._current_step().work.is_received_by(self._exchange.rank, micro_batch)

    def _parts(self, chunk: int) -> tuple[int, ...]:
        return self._current_step().work.plan.chunks[self._exchange.rank][chunk]

    def _encoder_of(self, chunk: int) -> Encode:
        """The encoder for a chunk; for a part of a split item, bound to that part."""
        part = self._part_exchange.part_in(self._current_step().work.plan, chunk)
        return self._encoder if part is None else partial(self._encoder, part=part)

    def _sizes(self, chunk: int) -> list[int]:
        return [self._current_step().work.plan.parts[part].num_tokens for part in self._parts(chunk)]

    def _record_sizes(self) -> None:
        step = self._current_step()
        step.stats.peak_feature_bytes = max(step.stats.peak_feature_bytes, step.store.peak_device_bytes)
        step.stats.sent_bytes = self._exchange.sent_bytes - step.sent_before
        step.stats.split_bytes = self._part_exchange.sent_bytes - step.split_before


def _num_bytes(in_flight: Iterable[tuple[int, Posted[Any]]]) -> int:
    return sum(posted.nbytes for _, posted in in_flight)

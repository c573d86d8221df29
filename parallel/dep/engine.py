"""One rank's part in the three phases of a step with a decoupled encoder (K2.5 report, section 4.5.1).

    engine.forward(work)            1. balanced vision forward, features to the first stages
    engine.leaf(micro_batch) …      2. the backbone's schedule, unchanged, takes the features of a micro-batch
    engine.backward()               3. gradients back to the encoders, vision recompute and backward

The engine owns what one step has: its plan, pixels, features and gradients.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from parallel.dep.exchange import FeatureExchange
from parallel.dep.parts import PartEncoder, PartExchange
from parallel.dep.plan import Piece, VisionPlan, pieces
from parallel.dep.stats import VisionStats
from parallel.dep.store import FeatureStore
from parallel.dep.vision_pass import Chunk, Encoder, encode, recompute_and_backward


@dataclass(frozen=True, slots=True)
class VisionWork:
    """What the encoders do in one step, and this rank's share of the pixels."""

    plan: VisionPlan
    """The same on every rank."""
    chunks: Sequence[Chunk]
    """This rank's chunks of the plan."""
    num_micro_batches: int
    """Of each replica."""


@dataclass(slots=True)
class _Step:
    """State of the step under way."""

    work: VisionWork
    pieces: list[Piece]
    store: FeatureStore
    sent_before: int
    """Bytes that the exchange of features had sent before the step."""
    split_before: int
    """Bytes that the exchange of parts had sent."""
    stats: VisionStats = field(default_factory=VisionStats)


class VisionEngine:
    """Runs the encoder of this rank, and hands features and gradients over."""

    def __init__(
        self,
        encoder: PartEncoder,
        exchange: FeatureExchange,
        part_exchange: PartExchange,
        *,
        device: torch.device,
        feature_dtype: torch.dtype,
        max_feature_bytes: int,
        is_trained: bool,
    ) -> None:
        """
        Args:
            encoder: this rank's replica; its parameters collect gradients if it `is_trained`.
            feature_dtype: what the backbone takes.
            max_feature_bytes: of features, or of gradients, on a device of the first stage at a time; what
                does not fit waits in host memory.
            is_trained: without it nothing is encoded a second time, and no gradient is sent.
        """
        self._encoder = encoder
        self._exchange = exchange
        self._part_exchange = part_exchange
        self._device = device
        self._feature_dtype = feature_dtype
        self._max_feature_bytes = max_feature_bytes
        self._is_trained = is_trained
        self._step: _Step | None = None
        self._stats: VisionStats | None = None

    @property
    def stats(self) -> VisionStats:
        """What this rank did in the last step."""
        assert self._stats is not None, "a step comes first"
        return self._stats

    def forward(self, work: VisionWork) -> None:
        """Encode this rank's chunks and bring all features to the first stages. Called by every rank."""
        store = FeatureStore(self._device, self._max_feature_bytes)
        found = pieces(work.plan, range(work.num_micro_batches))
        self._step = step = _Step(
            work, found, store, self._exchange.sent_bytes, self._part_exchange.sent_bytes
        )
        self._stats = step.stats
        step.stats.num_patches = sum(chunk.pixels.shape[0] for chunk in work.chunks)
        own: dict[int, Tensor] = {}
        with self._timed("forward_s"):
            for number, chunk in enumerate(work.chunks):
                features = encode(self._encoder_of(number), chunk, self._device)
                own |= zip(self._parts(number), features.split(self._sizes(number)), strict=True)
        with self._timed("exchange_s"):
            for micro_batch, piece in enumerate(step.pieces):
                received = self._exchange.to_first_stages(work.plan, piece, own)
                if received is not None:
                    store.put(micro_batch, received)
        self._note_sizes()

    def leaf(self, micro_batch: int) -> Tensor | None:
        """The features [V, D] of a micro-batch of this rank's replica, whose gradient the engine collects.

        None if the micro-batch has no items. To be taken once, by the first stage, when it runs forward.
        """
        step = self._step
        assert step is not None, "forward comes first"
        if not self._has_items(micro_batch):
            return None
        leaf = step.store.take(micro_batch).to(self._feature_dtype)
        if self._is_trained and torch.is_grad_enabled():
            leaf.requires_grad_()
            leaf.register_post_accumulate_grad_hook(lambda tensor: self._collect(micro_batch, tensor))
        return leaf

    def backward(self) -> None:
        """Bring gradients to the encoders, encode again and go backward. Called by every rank."""
        step = self._step
        assert step is not None, "forward comes first"
        if not self._is_trained:
            self.release()
            return
        gradients: dict[int, Tensor] = {}
        with self._timed("exchange_s"):
            for micro_batch, piece in enumerate(step.pieces):
                own = step.store.take(micro_batch) if self._has_items(micro_batch) else None
                gradients |= self._exchange.to_encoders(step.work.plan, piece, own)
        with self._timed("backward_s"):
            for number, chunk in enumerate(step.work.chunks):
                gradient = torch.cat([gradients.pop(part) for part in self._parts(number)])
                recompute_and_backward(self._encoder_of(number), chunk, gradient)
        self._note_sizes()
        self.release()

    def release(self) -> None:
        """Let go of pixels and features; `backward` does, an evaluation has to."""
        self._step = None

    def _collect(self, micro_batch: int, leaf: Tensor) -> None:
        assert self._step is not None
        assert leaf.grad is not None
        self._step.store.put(micro_batch, leaf.grad)
        leaf.grad = None

    def _has_items(self, micro_batch: int) -> bool:
        """Whether this rank is a first stage, and the micro-batch of its replica has items."""
        assert self._step is not None
        replica = self._exchange.replica
        piece = self._step.pieces[micro_batch]
        return any(receiver == replica for _, receiver in piece)

    def _parts(self, chunk: int) -> tuple[int, ...]:
        assert self._step is not None
        return self._step.work.plan.chunks[self._exchange.rank][chunk]

    def _encoder_of(self, chunk: int) -> Encoder:
        """The encoder, which knows of a chunk that is a part of an item, and of which."""
        assert self._step is not None
        part = self._part_exchange.part_in(self._step.work.plan, chunk)
        return self._encoder if part is None else partial(self._encoder, part=part)

    def _sizes(self, chunk: int) -> list[int]:
        assert self._step is not None
        return [self._step.work.plan.parts[part].num_tokens for part in self._parts(chunk)]

    def _note_sizes(self) -> None:
        assert self._step is not None
        stats = self._step.stats
        stats.peak_feature_bytes = max(stats.peak_feature_bytes, self._step.store.peak_device_bytes)
        stats.sent_bytes = self._exchange.sent_bytes - self._step.sent_before
        stats.split_bytes = self._part_exchange.sent_bytes - self._step.split_before

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Add the seconds until the device is done to a field of the statistics."""
        assert self._step is not None
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        stats = self._step.stats
        setattr(stats, what, getattr(stats, what) + time.perf_counter() - started)

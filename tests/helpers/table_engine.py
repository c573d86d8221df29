"""An engine whose model is a table: the next token's logits are a row, chosen by the last one.

It keeps every promise of the protocol, in a page, and so tells what servers and clients between make of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from k25_train.config.vision import VisionConfig
from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.base import (
    EngineError,
    EngineState,
    FinishReason,
    Generated,
    PauseMode,
    ProbeSequence,
    Request,
    Sampling,
    VersionSpan,
)
from k25_train.rollout.engines.served_model import ServedModel

VOCAB_SIZE = 64
MEDIA_PAD = 63


def served_model(vision: VisionConfig) -> ServedModel:
    """What a client has to know of it."""
    return ServedModel(vocab_size=VOCAB_SIZE, media_pad=MEDIA_PAD, vision=vision)


def table_tensors(seed: int) -> list[NamedTensor]:
    """Weights, other ones for every seed."""
    table = 2 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    # As in a trained model, placeholders hardly ever come.
    table[:, MEDIA_PAD] = -30.0
    return [NamedTensor("table", table)]


class TableEngine:
    """Implements `Engine`."""

    name = "table"

    def __init__(self, model: ServedModel, *, seed: int = 0, step_s: float = 0.0) -> None:
        """`seed` of its first weights, version 0; `step_s`: seconds a token."""
        self._model, self._step_s = model, step_s
        self._table = table_tensors(seed)[0].tensor
        self._version = 0
        self._staged: tuple[torch.Tensor, int] | None = None
        self._goes_on, self._num_aborts = asyncio.Event(), 0
        self._goes_on.set()
        self.running = 0

    async def generate(self, request: Request) -> Generated:
        prompt_ids = self._model.expanded(request.prompt_ids, request.images)
        tokens, logprobs, versions = list(request.response_ids), [], []
        sampling, first, aborts = request.sampling, len(request.response_ids), self._num_aborts
        self.running += 1
        try:
            reason = None
            while reason is None:
                await asyncio.sleep(self._step_s)
                if aborts != self._num_aborts:
                    reason = FinishReason.aborted
                    break
                if not self._goes_on.is_set():
                    await asyncio.sleep(0.001)
                    continue
                last = tokens[-1] if tokens else int(prompt_ids[-1])
                of_all = self._logprobs(last, request.images)
                token = _draw(of_all, sampling, len(tokens))
                tokens.append(token)
                logprobs.append(of_all[token].item())
                versions.append(self._version)
                reason = _end(tokens, sampling)
        finally:
            self.running -= 1
        return Generated(
            prompt_ids=prompt_ids,
            token_ids=np.array(tokens[first:], dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            spans=_spans(versions),
            finish_reason=reason,
        )

    async def pause(self, mode: PauseMode) -> None:
        self._goes_on.clear()
        if mode is PauseMode.abort:
            self._num_aborts += 1

    async def resume(self) -> None:
        self._goes_on.set()

    async def stage(self, tensors: Iterable[NamedTensor] | Path, version: int) -> None:
        if isinstance(tensors, Path):
            files = [load_file(path) for path in sorted(tensors.glob("*.safetensors"))]
            self._staged = files[0]["table"], version
        else:
            self._staged = next(iter(tensors)).tensor, version

    async def commit(self, version: int) -> None:
        if self._staged is None or self._staged[1] != version or self._goes_on.is_set():
            raise EngineError(
                f"{self.name}: version {version} is not staged, or it is not paused\n  -> pause"
            )
        (self._table, self._version), self._staged = self._staged, None

    async def adopt(self, version: int) -> None:
        raise EngineError(f"{self.name}: weights come by commit alone")

    async def probe(self, sequences: Sequence[ProbeSequence]) -> list[np.ndarray]:
        found = []
        for ids, images in sequences:
            expanded = self._model.expanded(ids, images).tolist()
            rows = [self._logprobs(token, images) for token in expanded[:-1]]
            values = [row[token].item() for row, token in zip(rows, expanded[1:], strict=True)]
            found.append(np.array(values, dtype=np.float32))
        return found

    async def state(self) -> EngineState:
        return EngineState(version=self._version, running=self.running, waiting=0, busy_share=0.0, kv_use=0.0)

    async def close(self) -> None:
        pass

    def _logprobs(self, last: int, images: Sequence[bytes]) -> torch.Tensor:
        """[V] float32: of the next token; the mean of the images' pixels shifts them."""
        shift = sum(np.asarray(Image.open(io.BytesIO(image)).convert("L")).mean() / 255 for image in images)
        logits = self._table[last] + float(shift) * torch.linspace(0, 1, VOCAB_SIZE)
        return logits.log_softmax(-1)


def _draw(logprobs: torch.Tensor, sampling: Sampling, position: int) -> int:
    drawn_from = logprobs / (sampling.temperature or 1.0)
    drawn_from[list(sampling.forbidden_ids)] = float("-inf")
    if sampling.temperature == 0:
        return int(drawn_from.argmax())
    digest = hashlib.blake2b(f"{sampling.seed} {position}".encode(), digest_size=8).digest()
    uniform = int.from_bytes(digest, "little") / 2**64
    cumulative = (drawn_from - drawn_from.max()).double().exp().cumsum(0)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1].item(), right=True))


def _end(tokens: list[int], sampling: Sampling) -> FinishReason | None:
    if tokens[-1] in sampling.stop_ids:
        return FinishReason.stop
    return FinishReason.length if len(tokens) >= sampling.max_tokens else None


def _spans(versions: list[int]) -> tuple[VersionSpan, ...]:
    starts = [i for i, v in enumerate(versions) if i == 0 or v != versions[i - 1]]
    ends = [*starts[1:], len(versions)]
    return tuple(VersionSpan(versions[a], a, b) for a, b in zip(starts, ends, strict=True) if versions)

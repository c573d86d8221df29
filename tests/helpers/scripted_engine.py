"""An engine without a model: tokens and log-probabilities are hashes of weights, version, seed and position.

What it answers depends on nothing else, so whatever is killed, paused or cut, the same response comes out.
`faults` are what it does wrong, each once: the next request takes the next one.
"""

import asyncio
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.base import (
    EngineError,
    EngineState,
    FinishReason,
    Generated,
    PauseMode,
    ProbeSequence,
    Request,
    VersionSpan,
)

FAULTS = ("raise", "hang", "nan", "truncated", "empty", "old", "forbidden")
"""What it can do wrong."""
NUM_IDS, MEAN_LENGTH = 200, 6
ENDS = -1
"""In the place of whichever id ends a response."""


class ScriptedEngine:
    """See `Engine`. Text ids are 0 to `num_ids` - 1; about one in `mean_length` ends a response."""

    def __init__(
        self,
        *,
        num_ids: int = NUM_IDS,
        mean_length: int = MEAN_LENGTH,
        pause_s: float = 0.0,
        faults: Sequence[str] = (),
        name: str = "scripted",
    ) -> None:
        """`pause_s`: seconds that a token takes."""
        self._num_ids, self._mean_length, self._pause_s = num_ids, mean_length, pause_s
        self._name = name
        self._may_run = asyncio.Event()
        self._may_run.set()
        self.faults = list(faults)
        self.version = -1
        self.weights = 0
        """CRC-32 of what was committed: other weights give other tokens."""
        self.staged: tuple[int, int] | None = None
        self.asked: list[Request] = []
        """Every request, in order."""
        self.running = 0

    @property
    def name(self) -> str:
        return self._name

    async def generate(self, request: Request) -> Generated:
        self.asked.append(request)
        fault = self.faults.pop(0) if self.faults else ""
        self.running += 1
        try:
            return await self._generate(request, fault)
        finally:
            self.running -= 1

    async def _generate(self, request: Request, fault: str) -> Generated:
        if fault == "raise":
            raise EngineError(f"{self._name}: status 500")
        if fault == "hang":
            await asyncio.sleep(3600)
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        reason = FinishReason.length
        for position in range(len(request.response_ids), request.sampling.max_tokens):
            await asyncio.sleep(self._pause_s)
            # Nothing comes between this and the draw: a pause is between two tokens.
            await self._may_run.wait()
            drawn = drawn_at(self.version, self.weights, request.sampling.seed, position)
            token = token_of(drawn, position, self._num_ids, self._mean_length)
            tokens.append(request.sampling.stop_ids[0] if token == ENDS else token)
            logprobs.append(logprob_of(drawn))
            versions.append(self.version)
            if token == ENDS:
                reason = FinishReason.stop
                break
        return self._answer(request, fault, tokens, logprobs, versions, reason)

    def _answer(
        self,
        request: Request,
        fault: str,
        tokens: list[int],
        logprobs: list[float],
        versions: list[int],
        reason: FinishReason,
    ) -> Generated:
        if fault == "nan":
            logprobs[-1] = float("nan")
        if fault == "truncated":
            logprobs.pop()
        if fault == "empty":
            tokens, logprobs, versions = [], [], []
        if fault == "old":
            versions = [version - 1 for version in versions]
        if fault == "forbidden":
            tokens[0] = request.sampling.forbidden_ids[0]
        return Generated(
            prompt_ids=np.array(request.prompt_ids, np.int32),
            token_ids=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            spans=tuple(_spans(versions)),
            finish_reason=reason,
        )

    async def pause(self, mode: PauseMode) -> None:
        self._may_run.clear()

    async def resume(self) -> None:
        self._may_run.set()

    async def stage(self, tensors: Iterable[NamedTensor] | Path, version: int) -> None:
        crc = 0
        for tensor in _read(tensors) if isinstance(tensors, Path) else tensors:
            crc = zlib.crc32(tensor.tensor.contiguous().numpy().tobytes(), crc)
        self.staged = version, crc

    async def commit(self, version: int) -> None:
        if self.staged is None or self.staged[0] != version:
            raise EngineError(f"{self._name}: {self.staged} is staged, not {version}")
        self.version, self.weights = self.staged

    async def adopt(self, version: int) -> None:
        self.version = version

    async def probe(self, sequences: Sequence[ProbeSequence]) -> list[np.ndarray]:
        return [np.zeros(len(each.token_ids) - 1, np.float32) for each in sequences]

    async def state(self) -> EngineState:
        return EngineState(version=self.version, running=self.running, waiting=0, busy_share=0.5, kv_use=0.0)

    async def close(self) -> None:
        pass


def _read(folder: Path) -> Iterator[NamedTensor]:
    """Tensors of a folder of safetensors files: one file's in the order of their names."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            yield NamedTensor(name, tensor)


def drawn_at(version: int, weights: int, seed: int, position: int) -> int:
    """What is drawn for a token."""
    text = f"{version} {weights} {seed} {position}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest())


def token_of(drawn: int, position: int, num_ids: int = NUM_IDS, mean_length: int = MEAN_LENGTH) -> int:
    """The token that is drawn; `ENDS` for one that ends the response."""
    return ENDS if position > 0 and drawn % mean_length == 0 else drawn // 64 % num_ids


def logprob_of(drawn: int) -> float:
    """Its log-probability."""
    return -(drawn % 977) / 300


def _spans(versions: Sequence[int]) -> Iterator[VersionSpan]:
    start = 0
    for stop in range(1, len(versions) + 1):
        if stop == len(versions) or versions[stop] != versions[start]:
            yield VersionSpan(versions[start], start, stop)
            start = stop

"""The engine in this process: no server, and no file between the trainer's weights and its own.

    engine = InProcessEngine(model, ids=ids, max_running=64, device="cpu", dtype=torch.float32, threads=0)
    await engine.pause(PauseMode.keep)
    await engine.stage(named_tensors, version=0)
    await engine.commit(0)
    await engine.resume()
    generated = await engine.generate(request)

It is made without weights: what is asked before the first commit is refused. Methods may be called from any
event loop. `stage` takes its tensors in the thread of its caller, since a trainer's stream may be collective,
and lets other coroutines run between two of them. A request that is cancelled frees its slot at the next
token, so that a time limit is the caller's `asyncio.wait_for`.

Responses that are kept in a pause go on after a commit with the new weights, from keys that these have made
of all their tokens; the tokens themselves stay, with the version that drew them.
"""

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

from k25_train.config.model import ModelConfig
from k25_train.export.hf_config import SpecialIds
from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.base import (
    EngineError,
    EngineState,
    Generated,
    PauseMode,
    ProbeSequence,
    Request,
)
from k25_train.rollout.engines.in_process.folder import folder_tensors
from k25_train.rollout.engines.in_process.network import Network
from k25_train.rollout.engines.in_process.responses import Response, check_request, expand
from k25_train.rollout.engines.in_process.responses import Sequence as Expanded
from k25_train.rollout.engines.in_process.slots import Slots
from k25_train.rollout.engines.in_process.weights import Layout, StagedWeights
from k25_train.rollout.engines.in_process.worker import Worker

_TENSORS_AT_ONCE = 32
"""Tensors that are taken before other coroutines get a turn."""


class InProcessEngine:
    """See `Engine`."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        ids: SpecialIds,
        max_running: int,
        device: torch.device | str,
        dtype: torch.dtype,
        threads: int,
        name: str = "in_process",
    ) -> None:
        """Build the model, without weights, and start the thread.

        Args:
            model: as the trainer has it.
            ids: special tokens of its vocabulary (`k25_train/export/hf_config.py`).
            max_running: responses that are generated at once.
            device: of weights and caches.
            dtype: of weights and caches, float32 or bfloat16.
            threads: of torch's operators in the whole process; 0 leaves them alone.
            name: what messages call it.

        Raises `EngineError` for a model that transformers has no like of.
        """
        self._model = model
        self._name = name
        self._network = Network(model, ids, torch.device(device), dtype)
        self._layout = Layout(model, self._network.weights)
        self._slots = Slots(self._network, max_running, name)
        self._staged: StagedWeights | None = None
        self._worker = Worker(self._slots, name, threads)

    @property
    def name(self) -> str:
        """See `Engine`."""
        return self._name

    async def generate(self, request: Request) -> Generated:
        """See `Engine`. Raises `EngineError` for a request that cannot be answered, and where it fails."""
        name = f"{self._name}: {request.key}"
        prompt = await self._expanded(request, name)
        check_request(
            request,
            prompt,
            name,
            vocab_size=self._network.vocab_size,
            media_pad=self._network.media_pad,
            longest=self._network.max_length,
        )
        if self._slots.version < 0:
            raise EngineError(f"{name}: the engine has no weights yet; stage and commit a version first")
        response = Response(request, prompt, Future(), [*prompt.ids, *request.response_ids])
        if (reason := response.end) is not None:
            response.finish(reason)
        else:
            self._worker.submit(response)
        return await asyncio.wrap_future(response.future)

    async def pause(self, mode: PauseMode) -> None:
        """See `Engine`. To abort ends those that wait for a slot as well."""

        def stop() -> None:
            self._worker.paused = True
            if mode is PauseMode.abort:
                self._slots.abort()

        await asyncio.wrap_future(self._worker.call(stop))

    async def resume(self) -> None:
        """See `Engine`."""

        def go_on() -> None:
            self._worker.paused = False

        await asyncio.wrap_future(self._worker.call(go_on))

    async def stage(self, tensors: Iterable[NamedTensor] | Path, version: int) -> None:
        """See `Engine`. Raises `EngineError` that names a tensor which is missing, unknown or misshapen; what
        was staged before is gone in any case."""
        self._staged = None
        staged = StagedWeights(version, self._layout, self._network.weights)
        stream = folder_tensors(tensors) if isinstance(tensors, Path) else tensors
        for number, tensor in enumerate(stream, start=1):
            staged.take(tensor)
            if number % _TENSORS_AT_ONCE == 0:
                await asyncio.sleep(0)
        staged.check_complete()
        self._staged = staged

    async def commit(self, version: int) -> None:
        """See `Engine`."""
        staged = self._staged
        if staged is None or staged.version != version:
            what = "nothing" if staged is None else f"version {staged.version}"
            raise EngineError(f"{self._name}: version {version} cannot be committed: {what} is staged")

        def swap() -> None:
            if not self._worker.paused:
                raise EngineError(
                    f"{self._name}: version {version} cannot be committed: the engine has to be paused"
                )
            staged.put_into(self._network.weights)
            self._slots.weights_changed(version)

        await asyncio.wrap_future(self._worker.call(swap))
        self._staged = None

    async def adopt(self, version: int) -> None:
        """See `Engine`: weights come by `stage` alone."""
        raise EngineError(f"{self._name}: has no other way of weights than rollout.transport=shared_memory")

    async def probe(self, sequences: Sequence[ProbeSequence]) -> list[np.ndarray]:
        """See `Engine`: a forward of each whole sequence, without a cache."""
        expanded = [
            await self._expanded(sequence, f"{self._name}: probe {number}")
            for number, sequence in enumerate(sequences)
        ]
        return await asyncio.wrap_future(
            self._worker.call(lambda: [self._logprobs(each) for each in expanded])
        )

    async def state(self) -> EngineState:
        """See `Engine`."""
        return await asyncio.wrap_future(self._worker.call(self._state))

    async def close(self) -> None:
        """See `Engine`. Requests that it has get an `EngineError`; twice is as once."""
        await asyncio.to_thread(self._worker.close)

    async def _expanded(self, sequence: Request | ProbeSequence, name: str) -> Expanded:
        arguments = (sequence, name, self._model.vision, self._network.media_pad)
        # Decoding takes milliseconds an image, which an event loop does not wait for.
        return await asyncio.to_thread(expand, *arguments) if sequence.images else expand(*arguments)

    def _logprobs(self, sequence: Expanded) -> np.ndarray:
        embeddings = self._slots.embed(sequence, sequence.ids)
        hidden = self._network.prompts([embeddings], None, slice(0, 0))[0]
        logprobs = torch.log_softmax(self._network.logits(hidden[:-1]).float(), dim=-1)
        following = torch.tensor(sequence.ids[1:], device=logprobs.device).unsqueeze(1)
        found: np.ndarray = logprobs.gather(1, following).squeeze(1).cpu().numpy()
        return found

    def _state(self) -> EngineState:
        return EngineState(
            version=self._slots.version,
            running=len(self._slots.running),
            waiting=len(self._slots.waiting),
            busy_share=self._worker.busy_share(),
            kv_use=self._slots.use,
        )

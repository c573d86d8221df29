"""Weights by Moonshot's checkpoint-engine: every rank's share to all engines of the same GPUs. CUDA only.

    every rank: its tensors ─► page-locked host memory ─► gather_metas ─► update: H2D, broadcast, reload
                               register_checkpoint                        engines read by CUDA IPC, and copy
                                                                          what is theirs of every bucket

Engines run on the GPUs of the trainer, started with
`--worker-extension-cls checkpoint_engine.worker.VllmColocateWorkerExtension` (checkpoint-engine 0.4.2). All
of them are paused before the update, and go on when all have it.

Not run: there was no GPU. Its order of calls is tested with a server that takes notes.
"""

from collections.abc import Callable
from typing import Any, Protocol

from k25_train.checkpoint.agreement import gather_from_ranks, on_first_rank
from k25_train.errors import ConfigError
from k25_train.rl.transports.base import Waiting
from k25_train.rl.transports.stream import PushedStream
from k25_train.rollout.engines.pool import EnginePool


class ParameterServer(Protocol):
    """What is used of checkpoint-engine's."""

    def register_checkpoint(self, checkpoint_name: str, *, named_tensors: dict[str, Any]) -> None:
        """Copy this rank's tensors to page-locked memory."""

    def gather_metas(self, checkpoint_name: str) -> None:
        """Tell all ranks who has what."""

    def update(self, checkpoint_name: str, req_func: Callable[[list[tuple[str, str]]], None]) -> None:
        """Broadcast everything; `req_func` asks the engine of this rank to read it."""

    def unregister_checkpoint(self, checkpoint_name: str) -> None:
        """Free the memory."""


class CheckpointEngineWay:
    """See `Way`."""

    def __init__(
        self,
        server: ParameterServer,
        ask_engine: Callable[[list[tuple[str, str]]], None],
        pool: EnginePool | None,
        wait: Waiting,
    ) -> None:
        """
        Args:
            server: checkpoint-engine's parameter server of this rank.
            ask_engine: asks the engine of this rank's GPU to read from sockets, by device.
            pool: all engines, on the first rank; None on others.
            wait: runs calls of engines, on the first rank.
        """
        self._server = server
        self._ask_engine = ask_engine
        self._pool = pool
        self._wait = wait

    def push(self, stream: PushedStream, version: int) -> int:
        """See `Way`."""
        name = f"version_{version}"
        # 1. Into host memory: engines still sample.
        tensors = dict(stream.own())
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._server.register_checkpoint(name, named_tensors=tensors)
        self._server.gather_metas(name)
        # 2. All engines stop between two tokens, every rank takes part in the update, then they go on.
        on_first_rank(lambda: self._ask(lambda pool: self._wait(pool.pause())))
        counted = gather_from_ranks(lambda: self._update(name, num_bytes))
        on_first_rank(lambda: self._ask(lambda pool: self._wait(pool.adopt(version))))
        return sum(counted)

    def close(self) -> None:
        """See `Way`; what is page-locked goes with the process."""

    def _update(self, name: str, num_bytes: int) -> int:
        self._server.update(name, self._ask_engine)
        self._server.unregister_checkpoint(name)
        return num_bytes

    def _ask(self, call: Callable[[EnginePool], None]) -> None:
        if self._pool is None:
            raise ConfigError("the first rank has no engines to push weights to")
        call(self._pool)


def parameter_server() -> ParameterServer:
    """This rank's. Raises `ConfigError` if checkpoint-engine is not installed."""
    try:
        from checkpoint_engine.ps import ParameterServer as Server  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"rollout.transport=checkpoint_engine: needs the package checkpoint-engine ({error}); install "
            "it, or use another rollout.transport"
        ) from error
    return Server(auto_pg=True)


def ask_vllm(url: str, timeout_s: float) -> Callable[[list[tuple[str, str]]], None]:
    """Asks the vLLM server of this rank's GPU to read from sockets."""

    def ask(sockets: list[tuple[str, str]]) -> None:
        from checkpoint_engine.api import request_inference_to_update  # type: ignore[import-not-found]

        request_inference_to_update(f"{url}/collective_rpc", dict(sockets), timeout_s)

    return ask

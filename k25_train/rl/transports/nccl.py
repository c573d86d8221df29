"""Weights broadcast over NCCL from the first rank to vLLM's workers, by vLLM's own sender. CUDA only.

    every rank ─► first rank ─► NCCL broadcast, packed ─► workers of all engines, paused, load them at once

vLLM's package has to be installed next to the trainer: its `NCCLTrainerWeightTransferEngine` packs and
sends, and calls `/init_weight_transfer_engine`, `/start_weight_update`, `/update_weights` and
`/finish_weight_update` (vLLM 0.32). Engines load into the weights that they sample from, so nothing is
staged: all of them are paused before the first byte, and none goes on before the last one has all of it.

Not run: there was no GPU. Its order of calls is tested with a sender that takes notes.
"""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol
from urllib.request import urlopen

import torch
from torch import Tensor

from k25_train.checkpoint.agreement import on_first_rank
from k25_train.errors import ConfigError
from k25_train.export.listing import DTYPE_BYTES
from k25_train.export.stream import TORCH_DTYPES
from k25_train.rl.transports.base import Waiting
from k25_train.rl.transports.stream import PushedStream
from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.engines.pool import EnginePool


class Sender(Protocol):
    """vLLM's sender on the first rank."""

    def send_weights(self) -> None:
        """Send all of its source."""


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """What vLLM asks of a tensor ahead of its elements (`ParamMeta`)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class StreamSource:
    """The stream as vLLM's `WeightSource`: the same tensors in the same order, announced and then given."""

    def __init__(self, device: torch.device) -> None:
        """`device`: where the sender wants tensors."""
        self._device = device
        self.stream: PushedStream | None = None
        """The version that is sent."""

    def metadata(self) -> list[TensorMeta]:
        """Name, number format and shape of all tensors."""
        assert self.stream is not None, "a version is pushed"
        return [
            TensorMeta(entry.name, TORCH_DTYPES[entry.dtype], entry.shape) for entry in self.stream.entries()
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        assert self.stream is not None, "a version is pushed"
        for name, tensor in self.stream.gathered():
            yield name, tensor.to(self._device)


class Fan:
    """vLLM's HTTP client of several servers at once; each has its workers behind those of the ones before."""

    def __init__(self, clients: Sequence[Any], workers: Sequence[int]) -> None:
        """`workers`: of each client's server, in the group of all."""
        self._clients = clients
        self._offsets = [1 + sum(workers[:number]) for number in range(len(workers))]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each server is told where its workers are in the group."""
        self._at_once(
            [
                partial(client.init_weight_transfer_engine, {**init_info, "rank_offset": offset})
                for client, offset in zip(self._clients, self._offsets, strict=True)
            ]
        )

    def start_weight_update(self) -> None:
        """On all servers."""
        self._at_once([client.start_weight_update for client in self._clients])

    def update_weights(self, update_info: Any) -> None:
        """On all servers."""
        self._at_once([partial(client.update_weights, update_info) for client in self._clients])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """On all servers."""
        self._at_once([partial(client.finish_weight_update, weight_version) for client in self._clients])

    def _at_once(self, calls: Sequence[Callable[[], Any]]) -> None:
        with ThreadPoolExecutor(len(calls)) as threads:
            for done in [threads.submit(call) for call in calls]:
                done.result()


class NcclWay:
    """See `Way`."""

    def __init__(
        self,
        pool: EnginePool | None,
        wait: Waiting,
        source: StreamSource,
        open_sender: Callable[[StreamSource], Sender],
    ) -> None:
        """
        Args:
            pool: the engines, on the first rank; None on others.
            wait: runs calls of engines, on the first rank.
            source: what the sender reads.
            open_sender: joins the group of all workers, at the first push, on the first rank.
        """
        self._pool = pool
        self._wait = wait
        self._source = source
        self._open_sender = open_sender
        self._sender: Sender | None = None

    def push(self, stream: PushedStream, version: int) -> int:
        """See `Way`."""
        self._source.stream = stream
        num_bytes = sum(DTYPE_BYTES[entry.dtype] * prod(entry.shape) for entry in stream.entries())
        if self._pool is None:
            for _ in stream.gathered():
                pass
        on_first_rank(lambda: self._send(stream, version))
        return num_bytes

    def close(self) -> None:
        """See `Way`; the group ends with the process."""

    def _send(self, stream: PushedStream, version: int) -> None:
        if self._pool is None:
            raise ConfigError("the first rank has no engines to push weights to")
        try:
            if self._sender is None:
                self._sender = self._open_sender(self._source)
            self._wait(self._pool.update_by(self._sender.send_weights, version))
        finally:
            # Other ranks wait to send, whatever has failed here.
            stream.drain()


def vllm_sender(urls: Sequence[str], address: str, timeout_s: float) -> Callable[[StreamSource], Sender]:
    """What joins the group of vLLM's workers, with this process as rank 0.

    Args:
        urls: of the servers, which say how many workers they have.
        address: of this node, as servers reach it.
        timeout_s: of each call of a server.

    Raises `ConfigError` if vLLM is not installed next to the trainer.
    """

    def open_sender(source: StreamSource) -> Sender:
        try:
            from vllm.distributed.weight_transfer.clients import (  # type: ignore[import-not-found]
                HTTPVLLMWeightSyncClient,
            )
            from vllm.distributed.weight_transfer.nccl_engine import (  # type: ignore[import-not-found]
                NCCLTrainerInitInfo,
                NCCLTrainerWeightTransferEngine,
            )
        except ImportError as error:
            raise ConfigError(
                f"rollout.transport=nccl: needs vLLM's package next to the trainer ({error}); install it, or "
                "use rollout.transport=shared_memory with engines on the first rank's node"
            ) from error
        clients = [HTTPVLLMWeightSyncClient(url, timeout_s) for url in urls]
        workers = [num_workers(url, timeout_s) for url in urls]
        info = NCCLTrainerInitInfo(
            master_address=address, master_port=_free_port(), world_size=1 + sum(workers), rank=0
        )
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=Fan(clients, workers), source=source)

    return open_sender


def num_workers(url: str, timeout_s: float) -> int:
    """Workers of a vLLM server, over its tensor, pipeline and data parallel sizes. Raises `EngineError`."""
    try:
        with urlopen(f"{url.rstrip('/')}/get_world_size", timeout=timeout_s) as answer:
            return int(json.load(answer)["world_size"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineError(
            f"{url}: does not say how many workers it has ({error})\n  -> start it with "
            "VLLM_SERVER_DEV_MODE=1, as `python -m k25_train.rollout serve` does"
        ) from error


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])

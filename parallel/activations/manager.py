"""The saved tensors of all passes of one rank: how each pass saves, and when offloaded tensors return.

```
 forward pass of a micro-batch          between passes                     backward pass
 forward_pass(key) ─► SavingPass        before_pass(n): prefetch those     nodes ask for what they hold
        tensors leave as they are saved  whose backward pass is near        and release it
```
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.activations.offload import NoOffload, OffloadEngine, OffloadStats
from parallel.activations.order import OffloadOrder
from parallel.activations.policy import Policy
from parallel.activations.saving_pass import SaveRecord, SavingPass
from parallel.activations.sizes import OUTPUTS_IN_FLIGHT
from parallel.activations.storage import deallocate_data, weights_of
from parallel.host.copier import copier_of
from parallel.host.upload import upload
from parallel.pipeline.schedule import PassKey


class ActivationManager:
    """Hands each pass of a rank its `SavingPass`, and prefetches what backward passes will need."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        chunks: Sequence[torch.nn.Module],
        order: OffloadOrder,
        engine: OffloadEngine | None,
        observe: Callable[[SaveRecord], None] | None = None,
    ) -> None:
        """
        Args:
            policies: name -> policy, for every name.
            chunks: the rank's chunks of the model.
            order: which passes to offload, and when to prefetch each, unless a step begins with another.
            engine: offloads tensors; None if no policy does.
            observe: called for every packed tensor.
        """
        self._policies, self._chunks = policies, chunks
        self._order, self._engine, self._observe = order, engine, observe
        self._weights: frozenset[int] | None = None
        self._position = 0
        self._outputs: deque[Tensor] = deque()

    def start_step(self, order: OffloadOrder) -> None:
        """Begin a step whose passes come in another number than before."""
        self._order = order

    def forward_pass(self, key: PassKey) -> SavingPass:
        """How a forward pass saves; make it `active` wherever the pass computes."""
        if self._weights is None:
            # Data parallelism moves weights into its buffers after the chunks are built.
            self._weights = weights_of(self._chunks)
        engine = None if key in self._order.stay else self._engine
        return SavingPass(self._policies, key, self._weights, engine, self._observe)

    def hold_output(self, output: Tensor) -> None:
        """Take a chunk's output; the schedule needs only its history, so its memory is freed once sent."""
        self._outputs.append(output)
        if len(self._outputs) > OUTPUTS_IN_FLIGHT:
            deallocate_data(self._outputs.popleft())

    def before_pass(self, num_done: int) -> None:
        """Start prefetching what is needed soon after `num_done` passes; may be called repeatedly."""
        if self._engine is None:
            return
        # Positions may be repeated, and skipped.
        while self._position <= num_done:
            for key in self._order.prefetch.get(self._position, ()):
                self._engine.prefetch(key)
            self._position += 1

    def finish_step(self) -> OffloadStats | NoOffload:
        """After all passes of a step: the engine's figures, each the maximum over ranks.

        Called by every rank. Raises RuntimeError if anything is still held.
        """
        # 1. Start over for the next step.
        self._position = 0
        self._outputs.clear()
        if self._engine is None:
            return NoOffload()
        # 2. Graphs are gone, so all tickets must be.
        self._engine.check_empty()
        stats = self._engine.read_stats()
        # 3. One collective for all figures; each gets its type back.
        values = upload(torch.tensor(astuple(stats), dtype=torch.float64), self._engine.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        kinds = [type(value) for value in astuple(stats)]
        return OffloadStats(*(kind(value) for kind, value in zip(kinds, values.tolist(), strict=True)))

    def close(self) -> None:
        """Release the host memory."""
        if self._engine is not None:
            self._engine.close()


def build_engine(device: torch.device, host_bytes: int, device_bytes: int) -> OffloadEngine:
    """An engine for the tensors of a device; allocates its host memory immediately.

    Raises `HostMemoryError` if the host does not have that much.
    """
    return OffloadEngine(copier_of(device), host_bytes, device_bytes)

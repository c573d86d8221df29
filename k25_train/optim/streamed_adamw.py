"""AdamW of state that rests in host memory, computed on the device through which it streams."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k25_train.units import MIB
from parallel.megatron.state_store import ParamGroups, StateStore

ADAM_STATE_KEYS = ("exp_avg", "exp_avg_sq")
CHUNK_ELEMENTS = 64 * MIB // 4
"""Most elements of a chunk: a tensor of this many is 64 MiB, and six are on the device at a time."""


class Part(NamedTuple):
    """Elements of a shard."""

    group: int
    """Index of the shard's parameter group."""
    master: Tensor
    """The shard [N]."""
    start: int
    """The first element."""
    size: int
    """Number of elements."""

    def of(self, shard: Tensor) -> Tensor:
        """The elements [size] of a tensor of the shard's shape."""
        return shard[self.start : self.start + self.size]


class StreamedAdamW(torch.optim.AdamW):
    """torch's fused AdamW on float32 shards in host memory, chunk by chunk.

    State is torch's (`exp_avg`, `exp_avg_sq`, `step`), as are the parameter groups, which also count steps
    like the fused Adams of Apex and Transformer Engine do: checkpoints are interchangeable with all of these.
    """

    def __init__(self, groups: ParamGroups, store: StateStore) -> None:
        """`groups` have rate, betas, epsilon and decay."""
        super().__init__(groups)
        self._store = store

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every shard in place."""
        assert closure is None, "gradients are ready when the optimizer steps"
        for group in self.param_groups:
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
        chunks = list(self._chunks())
        lane = self._store.lane(3 * max((sum(part.size for part in chunk) for chunk in chunks), default=0))
        ahead = [lane.load(self._state_of(chunk)) for chunk in chunks[:1]]
        for number, chunk in enumerate(chunks):
            # The next chunk is on its way while this one is computed.
            loaded = ahead.pop()
            ahead += [lane.load(self._state_of(following)) for following in chunks[number + 1 : number + 2]]
            self._update(chunk, loaded.tensors())
            loaded.write_back()
        lane.close()

    def _chunks(self) -> Iterator[list[Part]]:
        """All shards, in order, in chunks of at most `CHUNK_ELEMENTS`."""
        chunk: list[Part] = []
        room = CHUNK_ELEMENTS
        for number, group in enumerate(self.param_groups):
            for master in group["params"]:
                start = 0
                while start < master.numel():
                    size = min(room, master.numel() - start)
                    chunk.append(Part(number, master, start, size))
                    start, room = start + size, room - size
                    if not room:
                        yield chunk
                        chunk, room = [], CHUNK_ELEMENTS
        if chunk:
            yield chunk

    def _state_of(self, chunk: list[Part]) -> list[Tensor]:
        """Of each part the master and both moments."""
        return [
            part.of(tensor)
            for part in chunk
            for tensor in (part.master, *(self.state[part.master][key] for key in ADAM_STATE_KEYS))
        ]

    def _update(self, chunk: list[Part], tensors: list[Tensor]) -> None:
        """Update a chunk whose state is on the device, and hand on its masters."""
        for number, group in enumerate(self.param_groups):
            # 1. The parts of one group: masters and moments as lists.
            chosen = [index for index, part in enumerate(chunk) if part.group == number]
            if not chosen:
                continue
            masters, firsts, seconds = ([tensors[3 * index + kind] for index in chosen] for kind in range(3))
            parts = [chunk[index] for index in chosen]
            gradients = [part.of(self._store.gradient(part.master)) for part in parts]
            # 2. The kernel reads the number of the step from the device, and does not count itself.
            count = torch.full((), float(group["step"]), device=masters[0].device)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                masters,
                gradients,
                firsts,
                seconds,
                [],
                [count] * len(parts),
                amsgrad=False,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            # 3. Checkpoints read it from the state.
            for part, values in zip(parts, masters, strict=True):
                self.state[part.master]["step"] = torch.tensor(float(group["step"]))
                self._store.finish(part.master, part.start, values)

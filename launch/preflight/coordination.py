"""How ranks tell rank 0 what they found: over the store through which they met, never over a collective.

A collective hangs with its slowest member and does not say who that is. A store knows who has answered.
"""

import base64
import contextlib
import datetime
import os
import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist

from launch.preflight.cross_node import Offset
from launch.preflight.reach import neighbours, try_to_reach

CLOCK_ROUNDS = 5
"""Questions to a node for its time; the quickest answer is the most exact."""

PARTING_S = 10.0
"""For which rank 0 waits for the others to leave; those that hang or are gone never will."""


class Meeting:
    """This rank's place among all, and what they have told."""

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        ranks_per_node: int,
        hosts: Sequence[str] | None = None,
    ) -> None:
        """`hosts` are the names of all nodes, if whoever started the ranks knows them."""
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.ranks_per_node = ranks_per_node
        self.hosts = hosts

    @property
    def is_first(self) -> bool:
        """Whether this rank collects and judges."""
        return self.rank == 0

    @property
    def speaks_for_node(self) -> bool:
        """Whether this rank reads the node."""
        return self.local_rank == 0

    @property
    def node_ranks(self) -> range:
        """The ranks that read their nodes."""
        return range(0, self.world_size, self.ranks_per_node)

    def node_rank(self, rank: int) -> int:
        """The rank that reads the node of `rank`."""
        return rank - rank % self.ranks_per_node

    def tell(self, phase: str, value: object) -> None:
        """Leave a value for rank 0."""
        self.store.set(f"{phase}/{self.rank}", base64.b64encode(pickle.dumps(value)).decode())

    def collect(self, phase: str, ranks: Iterable[int], timeout_s: float) -> dict[int, Any]:
        """Rank -> what it told, for those that did within `timeout_s`; called by rank 0."""
        deadline = time.monotonic() + timeout_s
        told = {}
        for rank in ranks:
            # Whoever comes after a silent rank has had the time as well, so is only looked up.
            remaining_s = max(0.05, deadline - time.monotonic())
            with contextlib.suppress(dist.DistStoreError):
                self.store.wait([f"{phase}/{rank}"], datetime.timedelta(seconds=remaining_s))
                told[rank] = pickle.loads(base64.b64decode(self.store.get(f"{phase}/{rank}")))
        return told

    def agree(
        self, phase: str, ranks: Sequence[int], is_good: Callable[[Any], bool], timeout_s: float
    ) -> tuple[dict[int, Any], bool]:
        """Whether all go on: if each of `ranks` has told something good. On rank 0 also what they told."""
        if not self.is_first:
            return {}, self.decide(phase, None, 2 * timeout_s)
        told = self.collect(phase, ranks, timeout_s)
        goes_on = len(told) == len(ranks) and all(is_good(value) for value in told.values())
        return told, self.decide(phase, goes_on, timeout_s)

    def decide(self, phase: str, goes_on: bool | None, timeout_s: float) -> bool:
        """Rank 0 gives its decision; the others get it, and stop if it does not come in time."""
        key = f"{phase}/decision"
        if goes_on is not None:
            self.store.set(key, str(goes_on))
            return goes_on
        try:
            self.store.wait([key], datetime.timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            return False
        return self.store.get(key) == b"True"

    def part(self, timeout_s: float) -> None:
        """Leave together: the others wait for rank 0, and it for them, as it may be what keeps the store."""
        if self.is_first:
            self.decide("parting", True, timeout_s)
            self.collect("gone", range(1, self.world_size), PARTING_S)
        else:
            self.decide("parting", None, timeout_s)
            self.tell("gone", True)

    def measure_clocks(self, timeout_s: float) -> dict[int, Offset | None]:
        """Rank of a node -> its clock against this one; called by rank 0 while the others `answer_clock`."""
        return {rank: self._measure_clock(rank, timeout_s) for rank in self.node_ranks if rank}

    def answer_clock(self, timeout_s: float) -> None:
        """Tell the time whenever rank 0 asks; called by the other ranks that read their nodes."""
        with contextlib.suppress(dist.DistStoreError):
            for question in range(CLOCK_ROUNDS):
                asked = f"clock/{self.rank}/{question}"
                self.store.wait([asked], datetime.timedelta(seconds=timeout_s))
                self.store.set(f"{asked}/answer", repr(time.time()))

    def try_neighbours(self, place: str, timeout_s: float) -> dict[int, str]:
        """Try to reach some other nodes while they do the same: rank that reads a node -> why that failed.

        Called by the ranks that read their nodes; `place` is where this one listens.
        """
        self.store.set(f"listens/{self.rank}", place)
        ranks = self.node_ranks
        refused: dict[int, str] = {}
        for number in neighbours(ranks.index(self.rank), len(ranks)):
            key = f"listens/{ranks[number]}"
            try:
                self.store.wait([key], datetime.timedelta(seconds=timeout_s))
            except dist.DistStoreError:
                reason: str | None = "it does not answer any more"
            else:
                reason = try_to_reach(self.store.get(key).decode())
            if reason is not None:
                refused[ranks[number]] = reason
        return refused

    def _measure_clock(self, rank: int, timeout_s: float) -> Offset | None:
        best: Offset | None = None
        for question in range(CLOCK_ROUNDS):
            asked = f"clock/{rank}/{question}"
            before_s = time.time()
            self.store.set(asked, "?")
            try:
                self.store.wait([f"{asked}/answer"], datetime.timedelta(seconds=timeout_s))
            except dist.DistStoreError:
                return best
            after_s = time.time()
            there_s = float(self.store.get(f"{asked}/answer"))
            offset = Offset(
                seconds=there_s - (before_s + after_s) / 2, uncertainty_s=(after_s - before_s) / 2
            )
            if best is None or offset.uncertainty_s < best.uncertainty_s:
                best = offset
        return best


def join(timeout_s: float, hosts: Sequence[str] | None = None) -> Meeting:
    """Meet the other ranks, started by torchrun or by `launch.preflight_rank`; alone if there is no RANK.

    Raises `RuntimeError` if rank 0 cannot be reached within `timeout_s`.
    """
    if "RANK" not in os.environ:
        return Meeting(dist.HashStore(), rank=0, world_size=1, local_rank=0, ranks_per_node=1)
    rank = int(os.environ["RANK"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        # torchrun has a store already.
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        # Those that never come are to be named, not waited for.
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return Meeting(
        dist.PrefixStore("preflight", store),
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        ranks_per_node=int(os.environ["LOCAL_WORLD_SIZE"]),
        hosts=hosts,
    )

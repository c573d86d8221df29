"""Coordination between ranks: through torch's key-value store, never through collectives.

A collective hangs with its slowest member and cannot tell which one that is. A store knows who has answered.
"""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist

from k25_train.joining.environment import read_environment
from k25_train.joining.listener import listen_at
from launch.preflight.cross_node import Offset
from launch.preflight.messages import MessageError, decode, encode
from launch.preflight.path_mtu import Rail
from launch.preflight.reach import neighbours, try_to_reach

CLOCK_ROUNDS = 5
"""Number of times a node is asked for its time; the fastest answer is the most accurate."""

LEAVE_TIMEOUT_S = 10.0
"""Time that rank 0 waits for the others to leave; ranks that hang or are gone never do."""


class Coordinator:
    """This rank's view of the job: where it is, and the store through which all ranks exchange values.

    Rank 0 collects and decides; the first rank of a node, its leader, reads the node.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        ranks_per_node: int,
        node_names: Sequence[str] | None = None,
    ) -> None:
        """`node_names` are the names of all nodes, if the launcher knows them."""
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.ranks_per_node = ranks_per_node
        self.node_names = node_names

    @property
    def is_first(self) -> bool:
        """Whether this rank collects and judges."""
        return self.rank == 0

    @property
    def is_node_leader(self) -> bool:
        """Whether this rank reads its node."""
        return self.local_rank == 0

    @property
    def node_leaders(self) -> range:
        """The first rank of every node."""
        return range(0, self.world_size, self.ranks_per_node)

    def leader_of(self, rank: int) -> int:
        """The first rank on the node of `rank`."""
        return rank - rank % self.ranks_per_node

    def publish(self, phase: str, value: object) -> None:
        """Store a value for rank 0, of a type that `messages.encode` takes."""
        self.store.set(f"{phase}/{self.rank}", encode(value))

    def collect[T](self, phase: str, ranks: Iterable[int], kind: type[T], timeout_s: float) -> dict[int, T]:
        """Rank -> value that it published, for the `ranks` that did within `timeout_s`; called by rank 0.

        A rank whose value is no `kind` is left out, as if it had published nothing.
        """
        deadline = time.monotonic() + timeout_s
        values: dict[int, T] = {}
        for rank in ranks:
            # The timeout covers all ranks: those after a silent one have had their time and are only polled.
            remaining_s = max(0.05, deadline - time.monotonic())
            with contextlib.suppress(dist.DistStoreError, MessageError):
                self.store.wait([f"{phase}/{rank}"], datetime.timedelta(seconds=remaining_s))
                values[rank] = decode(self.store.get(f"{phase}/{rank}"), kind)
        return values

    def collect_and_vote[T](
        self,
        phase: str,
        ranks: Sequence[int],
        kind: type[T],
        is_good: Callable[[T], bool],
        timeout_s: float,
    ) -> tuple[dict[int, T], bool]:
        """Decide together whether to go on: if each of `ranks` has published a `kind` that `is_good`.

        Returns:
            Rank -> value, on rank 0 only, and the decision.
        """
        if not self.is_first:
            return {}, self.share_decision(phase, None, 2 * timeout_s)
        values = self.collect(phase, ranks, kind, timeout_s)
        goes_on = len(values) == len(ranks) and all(is_good(value) for value in values.values())
        return values, self.share_decision(phase, goes_on, timeout_s)

    def share_decision(self, phase: str, goes_on: bool | None, timeout_s: float) -> bool:
        """Rank 0 shares `goes_on`; the others pass None and get it, or False if it is late."""
        key = f"{phase}/decision"
        if goes_on is not None:
            self.store.set(key, str(goes_on))
            return goes_on
        try:
            self.store.wait([key], datetime.timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            return False
        return self.store.get(key) == b"True"

    def share[T](self, phase: str, value: T | None, kind: type[T], timeout_s: float) -> T | None:
        """Rank 0 shares `value`; the others pass None and get it, or None if it is late or no `kind`."""
        if self.is_first:
            self.store.set(phase, encode(value))
            return value
        try:
            self.store.wait([phase], datetime.timedelta(seconds=timeout_s))
            return decode(self.store.get(phase), kind)
        except (dist.DistStoreError, MessageError):
            return None

    def leave(self, timeout_s: float) -> None:
        """Leave together: the others wait for rank 0, and rank 0 for them, since it may host the store."""
        if self.is_first:
            self.share_decision("leave", True, timeout_s)
            self.collect("left", range(1, self.world_size), bool, LEAVE_TIMEOUT_S)
        else:
            self.share_decision("leave", None, timeout_s)
            self.publish("left", True)

    def measure_clocks(self, timeout_s: float) -> dict[int, Offset | None]:
        """Node leader -> offset of its clock; called by rank 0 while the other leaders run `answer_clock`."""
        return {rank: self._measure_clock(rank, timeout_s) for rank in self.node_leaders if rank}

    def answer_clock(self, timeout_s: float) -> None:
        """Answer rank 0's requests for the time; called by the other node leaders."""
        with contextlib.suppress(dist.DistStoreError):
            for number in range(CLOCK_ROUNDS):
                request = f"clock/{self.rank}/{number}"
                self.store.wait([request], datetime.timedelta(seconds=timeout_s))
                self.store.set(f"{request}/answer", repr(time.time()))

    def try_neighbours(self, endpoint: str, timeout_s: float) -> dict[int, str]:
        """Try to connect to some other nodes while they do the same; called by the node leaders.

        Args:
            endpoint: where this node listens, from `reach.listening`.
            timeout_s: how long to wait for each other node's endpoint.

        Returns:
            Leader of each node that could not be reached -> why.
        """
        self.store.set(f"listens/{self.rank}", endpoint)
        leaders = self.node_leaders
        refused: dict[int, str] = {}
        for number in neighbours(leaders.index(self.rank), len(leaders)):
            key = f"listens/{leaders[number]}"
            try:
                self.store.wait([key], datetime.timedelta(seconds=timeout_s))
            except dist.DistStoreError:
                reason: str | None = "it no longer answers"
            else:
                reason = try_to_reach(self.store.get(key).decode())
            if reason is not None:
                refused[leaders[number]] = reason
        return refused

    def exchange_rails(self, rails: dict[str, Rail], timeout_s: float) -> dict[int, dict[str, Rail]]:
        """Leader of each node that this one tries -> its rails; called by the node leaders with their own.

        A node that does not answer within `timeout_s` has none.
        """
        self.publish("rails", rails)
        number = self.node_leaders.index(self.rank)
        others = [self.node_leaders[other] for other in neighbours(number, len(self.node_leaders))]
        return self.collect("rails", others, dict[str, Rail], timeout_s)

    def _measure_clock(self, rank: int, timeout_s: float) -> Offset | None:
        best: Offset | None = None
        for number in range(CLOCK_ROUNDS):
            request = f"clock/{rank}/{number}"
            before_s = time.time()
            self.store.set(request, "?")
            try:
                self.store.wait([f"{request}/answer"], datetime.timedelta(seconds=timeout_s))
            except dist.DistStoreError:
                return best
            after_s = time.time()
            # The answer was written in between; the middle is off by at most half the interval.
            there_s = float(self.store.get(f"{request}/answer"))
            offset = Offset(
                seconds=there_s - (before_s + after_s) / 2, uncertainty_s=(after_s - before_s) / 2
            )
            if best is None or offset.uncertainty_s < best.uncertainty_s:
                best = offset
        return best


def join(timeout_s: float, node_names: Sequence[str] | None = None) -> Coordinator:
    """Connect to the other ranks started by torchrun or `launch.preflight_rank`; alone if there are none.

    Raises `ConfigError` for a variable that is wrong, `RuntimeError` if rank 0 cannot be reached within
    `timeout_s`.
    """
    where = read_environment()
    if where.is_alone:
        return Coordinator(dist.HashStore(), rank=0, world_size=1, local_rank=0, ranks_per_node=1)
    listener = None
    if where.opens_store:
        # The store closes it.
        listener = listen_at(where.address, where.port, is_alone=where.is_on_one_node).detach()
    store = dist.TCPStore(
        where.address,
        where.port,
        is_master=where.opens_store,
        master_listen_fd=listener,
        # Ranks that never arrive are reported, not waited for.
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return Coordinator(
        dist.PrefixStore("preflight", store),
        rank=where.rank,
        world_size=where.world_size,
        local_rank=where.local_rank,
        ranks_per_node=where.local_world_size,
        node_names=node_names,
    )

"""What ranks exchange when communication is stuck: states and an alarm, in the job's store.

The store is the key-value server through which ranks find each other when the process group starts, outside
of all collectives. A separate connection is needed: on a shared one a request waits until the previous one is
answered, and the main thread's may be waiting for a dead rank.
"""

import datetime

import torch.distributed as dist

from parallel.watchdog.states import RankState

REQUEST_TIMEOUT_S = 10.0


class RankStateStore:
    """States and alarm of a job. Methods raise RuntimeError if the store does not answer."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        """`store` is this rank's own connection."""
        store.set_timeout(datetime.timedelta(seconds=REQUEST_TIMEOUT_S))
        self._store = dist.PrefixStore("watch", store)
        self.rank = rank
        self.world_size = world_size

    def publish(self, state: RankState) -> None:
        """Write this rank's state for others to read."""
        self._store.set(f"state/{self.rank}", state.to_json())

    def states(self) -> dict[int, RankState]:
        """The state that each rank published last; ranks that never did are left out."""
        return self._read("state")

    def raise_alarm(self) -> None:
        """Ask all ranks for an answer and to end. The first alarm of a job counts."""
        self._store.compare_set("alarm", "", str(self.rank))

    def alarm(self) -> int | None:
        """The rank that raised the alarm, if one did."""
        return int(self._store.get("alarm")) if self._store.check(["alarm"]) else None

    def answer(self, state: RankState) -> None:
        """Write what this rank is doing now that the alarm is raised."""
        self._store.set(f"answer/{self.rank}", state.to_json())

    def answers(self) -> dict[int, RankState]:
        """The states of the ranks that have answered the alarm."""
        return self._read("answer")

    def mark_reported(self) -> None:
        """Let the other ranks end: the report is printed."""
        self._store.set("reported", "1")

    def is_reported(self) -> bool:
        """Whether the report is printed."""
        return bool(self._store.check(["reported"]))

    def _read(self, name: str) -> dict[int, RankState]:
        keys = [f"{name}/{rank}" for rank in range(self.world_size)]
        # Getting a key that is not set waits for it.
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        texts = self._store.multi_get(keys) if keys else []
        return {state.rank: state for state in map(RankState.from_json, texts)}

"""Phases of a rank, who holds up whom, and when a watchdog ends the process."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.blame.evidence import STALLED
from parallel.watchdog.phases import PhaseTracker
from parallel.watchdog.rank_states import RankStateStore
from parallel.watchdog.stall_watchdog import STALLED_STATUS, StallWatchdog
from parallel.watchdog.states import Chain, RankState, blocking_chain, ranks_text, report


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def state(rank: int, waits_for: Sequence[int] = (), step: int = 5, *names: str) -> RankState:
    return RankState(
        rank=rank,
        step=step,
        phases=("train", *names),
        seconds=61.0,
        waits_for=tuple(waits_for),
        may_be_long=False,
    )


def waiting(**waits_for: Sequence[int]) -> dict[int, RankState]:
    """`r0=[1]`: rank 0 waits for rank 1; ranks that are not named do not answer."""
    return {int(name[1:]): state(int(name[1:]), ranks) for name, ranks in waits_for.items()}


# Phases.


def test_time_counts_in_phases_from_the_first_step_on() -> None:
    clock = Clock()
    tracker = PhaseTracker(0, clock)
    with tracker.phase("evaluate"):
        clock.wait(50)
        assert tracker.seconds_without_progress() == 0, "no step yet"
    with tracker.training(1):
        clock.wait(3)
        assert tracker.seconds_without_progress() == 3
        with tracker.phase("forward"):
            assert tracker.seconds_without_progress() == 0, "entering is progress"
            clock.wait(2)
            assert tracker.seconds_without_progress() == 2
        assert tracker.seconds_without_progress() == 0, "leaving is progress"
    clock.wait(50)
    assert tracker.seconds_without_progress() == 0, "between steps"
    with tracker.phase("checkpoint", may_be_long=True), tracker.phase("broadcast", (0, 1)):
        clock.wait(500)
        assert tracker.seconds_without_progress() == 0
        assert tracker.state().may_be_long


def test_a_state_tells_phases_and_peers() -> None:
    clock = Clock()
    tracker = PhaseTracker(1, clock)
    assert str(tracker.state()) == "rank 1, step 0: between steps, for 0.0 s"
    with tracker.training(7), tracker.phase("forward"), tracker.phase("all-to-all", lambda: [2, 0, 1, 2]):
        clock.wait(4)
        assert str(tracker.state()) == (
            "rank 1, step 7: train > forward > all-to-all, for 4.0 s, waits for ranks 0, 2"
        )
    with tracker.training(7), tracker.phase("all-reduce", (1,)):
        assert tracker.state().waits_for == (), "alone in its group"


def test_interleaved_phases_end_in_any_order() -> None:
    tracker = PhaseTracker(0)
    forward, backward = tracker.phase("forward"), tracker.phase("backward")
    forward.__enter__()
    backward.__enter__()
    forward.__exit__(None, None, None)
    assert tracker.state().phases == ("backward",)
    backward.__exit__(None, None, None)
    assert tracker.state().phases == ()


def test_a_phase_ends_with_an_error() -> None:
    tracker = PhaseTracker(0)
    with pytest.raises(ValueError, match="x"), tracker.phase("forward"):
        raise ValueError("x")
    assert tracker.state().phases == ()


def test_a_host_that_waits_for_its_device_waits_for_whom_it_last_communicated_with() -> None:
    tracker = PhaseTracker(0)
    with tracker.training(1), tracker.phase("forward"):
        with tracker.phase("all-to-all", (0, 1)):
            pass
        assert tracker.state().waits_for == ()
        busy = tracker.state(device_is_busy=True)
    assert busy.waits_for == (1,)
    assert busy.doing == "step 1: train > forward > device, all-to-all or later"


# Who holds up whom.

CHAINS = {
    "computes": (waiting(r0=[]), Chain((0,), (0,), ())),
    "chain": (waiting(r0=[1], r1=[2], r2=[]), Chain((0, 1, 2), (2,), ())),
    "silent": (waiting(r0=[1], r1=[2]), Chain((0, 1, 2), (2,), ())),
    "collective": (waiting(r0=[1, 2], r1=[0, 2], r2=[5], r5=[]), Chain((0, 2, 5), (5,), ())),
    "two": (waiting(r0=[1, 2], r1=[], r2=[]), Chain((0, 1), (1, 2), ())),
    "cycle": (waiting(r0=[1], r1=[2], r2=[1]), Chain((0, 1), (), (1, 2))),
    "all wait": (waiting(r0=[1, 2], r1=[0, 2], r2=[0, 1]), Chain((0,), (), (0, 1, 2))),
    "not in the chain": (waiting(r0=[1], r1=[], r2=[0]), Chain((0, 1), (1,), ())),
}


@pytest.mark.parametrize("case", CHAINS)
def test_culprits(case: str) -> None:
    states, expected = CHAINS[case]
    assert blocking_chain(states, 0) == expected


@st.composite
def jobs(draw: st.DrawFn) -> tuple[dict[int, RankState], int]:
    """States of some ranks of a job of up to 8, and one of them that has noticed."""
    size = draw(st.integers(1, 8))
    answering = draw(st.sets(st.integers(0, size - 1), min_size=1))
    peers = st.sets(st.integers(0, size - 1), max_size=3)
    states = {rank: state(rank, sorted(draw(peers) - {rank})) for rank in answering}
    return states, draw(st.sampled_from(sorted(answering)))


@settings(max_examples=300, deadline=None)
@given(jobs())
def test_a_chain_ends_with_a_culprit_or_in_a_cycle(job: tuple[dict[int, RankState], int]) -> None:
    states, first = job
    chain = blocking_chain(states, first)
    assert bool(chain.culprits) != bool(chain.cycle)
    assert chain.path[0] == first
    for rank, peer in zip(chain.path, chain.path[1:], strict=False):
        assert peer in states[rank].waits_for
    assert chain.path[-1] in (chain.culprits or chain.cycle)
    for rank in chain.culprits:
        assert rank not in states or not states[rank].waits_for
    for rank in chain.cycle:
        assert set(states[rank].waits_for) & set(chain.cycle)
        assert any(rank in states[other].waits_for for other in chain.cycle)
    # Nobody that a culprit-free answer could have named is left out.
    reached, queue = {first}, [first]
    for rank in queue:
        for peer in states[rank].waits_for if rank in states else ():
            if peer not in reached:
                reached.add(peer)
                queue.append(peer)
    ends = {rank for rank in reached if rank not in states or not states[rank].waits_for}
    assert set(chain.culprits) == ends


@given(st.sets(st.integers(0, 30)), st.booleans())
def test_states_survive_the_store(ranks: set[int], may_be_long: bool) -> None:
    before = RankState(
        rank=3,
        step=2,
        phases=("a", "b"),
        seconds=1.5,
        waits_for=tuple(sorted(ranks)),
        may_be_long=may_be_long,
    )
    assert RankState.from_json(before.to_json().encode()) == before


def test_a_state_of_many_peers_is_short() -> None:
    assert len(state(0, range(1, 4096)).to_json()) < 200


def test_ranks_are_named_as_runs() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([8, 0, 1, 2]) == "ranks 0-2, 8"


def test_a_report_groups_ranks_and_names_those_that_are_silent() -> None:
    answers = {
        **{rank: state(rank, [4], 5, "forward", "all-to-all") for rank in range(3)},
        3: state(3, [], 5, "read data"),
    }
    text = report(answers, {4: state(4, [], 4, "optimizer")}, 0, 5, headline="STALL", logs="logs/x")
    assert text.splitlines() == [
        "STALL",
        "who waits for whom:",
        "  rank 0, step 5: train > forward > all-to-all, for 61.0 s, waits for rank 4",
        "  rank 4 does not answer: dead, stopped, or stuck in native code (last seen in step 4: train > "
        "optimizer)",
        "likely culprit: rank 4 does not answer: dead, stopped, or stuck in native code (last seen in step "
        "4: train > optimizer)",
        "all ranks:",
        "  ranks 0-2: step 5: train > forward > all-to-all",
        "  rank 3: step 5: train > read data",
        "  rank 4: no answer",
        "stacks: logs/x",
    ]


# The watchdog.


class Job:
    """The watchdogs of several ranks in one process, without their threads."""

    def __init__(self, size: int, folder: Path) -> None:
        self.clock = Clock()
        self.store = dist.HashStore()
        self.ended: list[tuple[int, int]] = []
        self.trackers = [PhaseTracker(rank, self.clock) for rank in range(size)]
        self.watchdogs = [self.watchdog(rank, folder) for rank in range(size)]

    def watchdog(self, rank: int, folder: Path) -> StallWatchdog:
        return StallWatchdog(
            self.trackers[rank],
            RankStateStore(self.store, rank, len(self.trackers)),
            timeout_s=60,
            folder=folder,
            device_is_busy=lambda: False,
            end=lambda status: self.ended.append((rank, status)),
        )

    def check(self, *ranks: int) -> None:
        """Let watchdogs check one after the other; none of them may be stuck."""
        for rank in ranks:
            self.watchdogs[rank].check()

    def raise_alarm(self, first: int, *others: int) -> None:
        """Let the watchdog of a stuck rank check, and others while it waits for their answers."""
        thread = threading.Thread(target=self.watchdogs[first].check)
        thread.start()
        deadline = time.monotonic() + 10
        while self.watchdogs[first].store.alarm() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self.check(*others)
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_a_stuck_rank_ends_all_with_one_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(2, tmp_path / "logs")
    first, second = job.trackers
    with first.training(4), second.training(4), first.phase("all-reduce", (0, 1)), second.phase("optimizer"):
        job.clock.wait(59)
        job.check(0, 1)
        assert job.ended == []
        job.clock.wait(1)
        job.raise_alarm(0, 1)
    # Whoever looks for the node to blame knows the status.
    assert sorted(job.ended) == [(0, STALLED_STATUS), (1, STALLED_STATUS)] and STALLED_STATUS == STALLED
    printed = capfd.readouterr().err
    assert printed.count("STALL: ") == 1
    assert "train.stall_timeout_s=60" in printed
    assert "likely culprit: rank 1, step 4: train > optimizer, for 60.0 s\n" in printed
    for rank in (0, 1):
        text = (tmp_path / f"logs/rank_{rank}.stall.txt").read_text()
        assert f"rank {rank}, step 4: train > " in text
        assert "test_watchdog.py" in text, "stacks of all threads"


def test_progress_on_another_rank_does_not_help_one_that_is_stuck(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Job(2, tmp_path)
    with job.trackers[0].training(4), job.trackers[1].training(4), job.trackers[0].phase("read data"):
        job.clock.wait(60)
        with job.trackers[1].phase("forward"):
            job.raise_alarm(0, 1)
    assert len(job.ended) == 2
    assert "likely culprit: rank 0, step 4: train > read data, for 60.0 s\n" in capfd.readouterr().err


def test_a_long_phase_excuses_those_who_wait(tmp_path: Path) -> None:
    job = Job(2, tmp_path)
    with job.trackers[0].training(4), job.trackers[0].phase("all-reduce", (0, 1)):
        with job.trackers[1].phase("checkpoint", may_be_long=True):
            job.check(1)
            job.clock.wait(1000)
            job.check(0)
            assert job.ended == []
        job.check(1)
        job.raise_alarm(0, 1)
    assert len(job.ended) == 2


def test_a_rank_that_never_answered_is_the_culprit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel.watchdog.stall_watchdog._GRACE_S", 0.0)
    job = Job(2, tmp_path)
    job.watchdogs[0].check_interval_s = 0.1
    with job.trackers[0].training(4), job.trackers[0].phase("pipeline recv", (1,)):
        job.clock.wait(60)
        job.check(0)
    assert job.ended == [(0, STALLED_STATUS)]
    printed = capfd.readouterr().err
    assert "waits for rank 1\n" in printed
    assert "likely culprit: rank 1 does not answer" in printed


def test_a_stuck_rank_reports_without_the_store(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(1, tmp_path)

    def fail(*_: Any) -> None:
        raise RuntimeError("connection refused")

    job.watchdogs[0].store.publish = fail  # type: ignore[method-assign]
    with job.trackers[0].training(4), job.trackers[0].phase("forward"):
        job.check(0)
        assert job.ended == [], "the end of a job takes the store away"
        job.clock.wait(60)
        job.check(0)
    assert job.ended == [(0, STALLED_STATUS)]
    assert "the job's store does not answer: connection refused" in capfd.readouterr().err
    assert "rank 0, step 4: train > forward" in (tmp_path / "rank_0.stall.txt").read_text()


def test_stacks_go_to_stderr_if_the_folder_cannot_be_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    job = Job(1, tmp_path / "file")
    with job.trackers[0].training(4):
        job.clock.wait(60)
        job.check(0)
    assert job.ended == [(0, STALLED_STATUS)]
    printed = capfd.readouterr().err
    assert "file/rank_0.stall.txt: cannot be written" in printed
    assert "test_watchdog.py" in printed

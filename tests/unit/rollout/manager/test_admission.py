"""The cap follows the engines' keys and values, and what goes next is fair: pure, over drawn cases."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from k25_train.rollout.engines.base import EngineState
from k25_train.rollout.manager.admission import Cap, CapRule
from k25_train.rollout.manager.fair_queue import MOST_CREDIT, FairQueue
from k25_train.rollout.manager.wheel import Wheel

RULE = CapRule(low=0.6, high=0.9, most=1000)


def engine(kv_use: float, waiting: int, running: int = 10) -> EngineState:
    return EngineState(version=0, running=running, waiting=waiting, busy_share=1.0, kv_use=kv_use)


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.integers(0, 2000)), max_size=3),
    st.integers(0, 1200),
)
def test_the_cap_moves_for_a_reason_alone(now: int, engines: list[tuple[float, int, int]], live: int) -> None:
    states = [engine(use, waiting, running) for use, waiting, running in engines]
    cap = Cap(value=now, reason="before")
    after = RULE.following(cap, states, live)
    assert 1 <= after.value <= 1000
    fullest = max((use for use, _, _ in engines), default=None)
    queue = sum(waiting for _, waiting, _ in engines)
    if after.value < now:
        assert fullest is not None and fullest >= 0.9 and queue
        assert after.value >= min(now, sum(running for _, _, running in engines))
        assert "kv_use" in after.reason
    if after.value > now:
        assert fullest is not None and fullest < 0.6 and not queue and live >= 0.95 * now
    if after.value == now and not states:
        assert after is cap


def test_the_cap_finds_what_fits() -> None:
    """An engine with room for 200 rollouts, each of which generates half of the time, of endlessly many."""
    cap, seen = RULE.first(), []
    for _ in range(200):
        live = cap.value
        wanted = live // 2
        running, waiting = min(wanted, 100), max(wanted - 100, 0)
        cap = RULE.following(cap, [engine(running / 100, waiting, running)], live)
        seen.append(cap.value)
    assert max(seen[-50:]) <= 220 and min(seen[-50:]) >= 120


def test_what_is_not_known_changes_nothing() -> None:
    assert RULE.following(RULE.first(), [], 1000) == RULE.first() and RULE.first().value == 1000


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.booleans()), max_size=200))
def test_every_one_goes_once_fairly_and_the_oldest_first(entries: list[tuple[str, int, bool]]) -> None:
    queue: FairQueue[int] = FairQueue()
    for number, (source, order, needs_sandbox) in enumerate(entries):
        queue.add(source, order, number, needs_sandbox=needs_sandbox)
    left, given = Counter(source for source, _, _ in entries), Counter[str]()
    latest: dict[str, tuple[int, int]] = {}
    while len(queue):
        number = queue.pop(sandboxes=1)
        assert number is not None
        source, order, _ = entries[number]
        # Sources that still wait were given as much, give or take one.
        assert all(given[other] >= given[source] for other in left if left[other])
        assert latest.get(source, (-1, -1)) < (order, number)
        latest[source] = (order, number)
        given[source] += 1
        left[source] -= 1
    assert not +left and queue.pop(1) is None and not queue.by_source()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=300))
def test_whom_no_sandbox_holds_back_goes(steps: list[tuple[str, bool, bool]]) -> None:
    queue: FairQueue[tuple[str, bool]] = FairQueue()
    waiting: Counter[tuple[str, bool]] = Counter()
    for number, (source, needs_sandbox, pops) in enumerate(steps):
        queue.add(source, number, (source, needs_sandbox), needs_sandbox=needs_sandbox)
        waiting[source, needs_sandbox] += 1
        if pops:
            found = queue.pop(sandboxes=0)
            free = sum(count for (_, needs), count in waiting.items() if not needs)
            assert (found is None) == (not free)
            if found:
                assert not found[1]
                waiting[found] -= 1
    assert len(queue) == sum(waiting.values()) == sum(queue.by_source().values())


def test_idling_earns_nothing_and_being_held_back_little() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        queue.add("busy", number, "busy", needs_sandbox=False)
    queue.add("boxed", 0, "boxed", needs_sandbox=True)
    assert [queue.pop(0) for _ in range(500)] == ["busy"] * 500
    for number in range(500):
        queue.add("late", number, "late", needs_sandbox=False)
        queue.add("boxed", number, "boxed", needs_sandbox=True)
    following = Counter(queue.pop(9) for _ in range(300))
    assert abs(following["late"] - following["busy"]) <= 1
    assert following["boxed"] - following["late"] <= MOST_CREDIT + 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "remove", "due"]), st.integers(0, 30), st.floats(0, 20)),
        max_size=80,
    )
)
def test_the_wheel_forgets_nobody_and_is_late_by_two_ticks_at_most(
    steps: list[tuple[str, int, float]],
) -> None:
    wheel: Wheel[int] = Wheel(0.5)
    places: dict[int, tuple[int, float]] = {}
    now = 0.0
    for what, entry, number in steps:
        if what == "put" and entry not in places:
            due = now + number
            places[entry] = (wheel.put(entry, due), due)
        elif what == "remove":
            bucket, _ = places.pop(entry, (-1, 0.0))
            wheel.remove(entry, bucket)
        else:
            now += number / 4
            for found in wheel.due(now):
                _, due = places.pop(found)
                assert due <= now
            assert all(now - due < 2 * wheel.tick_s for _, due in places.values())
        assert len(wheel) == len(places)

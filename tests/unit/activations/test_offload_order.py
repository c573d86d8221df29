"""When passes are offloaded and prefetched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.activations.order import offload_order
from parallel.pipeline.schedule import Pass, PassKey, schedule_of


@st.composite
def schedules(draw: st.DrawFn) -> list[Pass]:
    pp, vpp = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    num_micro_batches = pp * draw(st.integers(1, 4)) if vpp > 1 else draw(st.integers(1, 12))
    return schedule_of(
        pp, vpp, num_micro_batches, pp, draw(st.integers(0, pp - 1)), overlaps=draw(st.booleans())
    )


def turns_of(passes: list[Pass]) -> list[int]:
    """[position] -> how many starts come before: passes that run as one share one."""
    turns = [0]
    for each in passes[:-1]:
        turns.append(turns[-1] + (not each.overlaps_next))
    return turns


@given(schedules(), st.integers(1, 4))
def test_every_pass_stays_or_is_prefetched_in_time(passes: list[Pass], num_ahead: int) -> None:
    order = offload_order(passes, num_ahead)
    turns = turns_of(passes)
    turn_of = {(each.is_forward, each.key): turn for each, turn in zip(passes, turns, strict=True)}
    prefetched = {key: turns[position] for position, keys in order.prefetch.items() for key in keys}
    assert sum(len(keys) for keys in order.prefetch.values()) == len(prefetched)
    assert prefetched.keys() | order.stay == {key for _, key in turn_of}
    assert not prefetched.keys() & order.stay
    for key, turn in prefetched.items():
        assert turn == turn_of[False, key] - num_ahead
        # At least one pass runs between forward and the way back.
        assert turn >= turn_of[True, key] + 2
    for key in order.stay:
        assert turn_of[False, key] - turn_of[True, key] <= num_ahead + 1
    # Passes that run as one start with the first of them.
    assert all(position == turns.index(turns[position]) for position in order.prefetch)


def test_1f1b() -> None:
    """F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5: the first of four stages."""
    order = offload_order(schedule_of(4, 1, 6, 6, 0))
    assert order.stay == frozenset()
    assert order.prefetch == {
        2: (PassKey(0, 0),),
        4: (PassKey(0, 1),),
        6: (PassKey(0, 2),),
        7: (PassKey(0, 3),),
        8: (PassKey(0, 4),),
        9: (PassKey(0, 5),),
    }


def test_the_last_stage_offloads_nothing() -> None:
    order = offload_order(schedule_of(4, 1, 6, 6, 3))
    assert order.stay == {PassKey(0, number) for number in range(6)}
    assert not order.prefetch


def test_nothing_ahead_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_ahead = 0.*at least 1"):
        offload_order([], 0)

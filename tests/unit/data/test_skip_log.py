"""How many unusable samples a run puts up with, as a number and as a share."""

import pytest

from k25_train.data import skip_log
from k25_train.data.skip_log import FEWEST_SEEN, LISTED, SkipLog
from k25_train.errors import DataError


def add(log: SkipLog, *numbers: int) -> None:
    for number in numbers:
        log.add_named(f"sample {number}", "broken", log=False)


def test_a_number_is_the_most_and_each_counts_once() -> None:
    log = SkipLog(2)
    add(log, 1, 2, 1, 2)
    with pytest.raises(DataError, match=r"3 samples cannot be used, data\.max_skipped_samples=2 are allowed"):
        add(log, 3)


def test_a_share_is_of_the_samples_seen_but_of_some_at_the_start() -> None:
    log = SkipLog(0.001)
    add(log, *range(FEWEST_SEEN // 1000))
    log.saw(5 * FEWEST_SEEN)
    add(log, *range(5 * FEWEST_SEEN // 1000))
    told = f"=0.001, which is 50 after {5 * FEWEST_SEEN} samples, are allowed"
    with pytest.raises(DataError, match=told) as raised:
        add(log, -1)
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + LISTED + 1 + 1
    assert lines[LISTED + 1] == f"  and {51 - LISTED} more, which the log names"


def test_what_was_seen_is_never_less_than_before() -> None:
    log = SkipLog(0.5)
    log.saw(7)
    log.saw_in_all(5)
    log.saw(1)
    assert log.num_seen == 8


def test_only_new_ones_are_told() -> None:
    log = SkipLog(9)
    add(log, 1, 2)
    assert list(log.later_than(1)) == ["sample 2"]
    add(log, 3)
    assert log.later_than(2) == {"sample 3": "broken"}
    assert skip_log.SkipLog(0).later_than(0) == {}

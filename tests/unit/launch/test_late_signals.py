"""A signal that comes when a rank has saved and is about to end."""

import signal
from collections.abc import Iterator

import pytest

from k25_train.training.trainer import StopRequest

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of this process, put back."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_signals_count_until_the_run_is_over_and_change_nothing_later(number: signal.Signals) -> None:
    stop = StopRequest()
    signal.raise_signal(number)
    assert stop.received == number

    late = StopRequest()
    late.close()
    signal.raise_signal(number)
    assert late.received == 0
    # Not a function of Python's, which would be taken away before the process ends.
    assert signal.getsignal(number) is signal.SIG_IGN

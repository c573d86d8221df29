"""A signal that comes when a rank has saved and is about to end."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from k25_train.startup.interrupts import end_quietly_on_interrupt
from k25_train.training import stop
from k25_train.training.stop import StopRequest, most_of_any_rank

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of this process, put back."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_signals_count_until_the_run_is_over_and_change_nothing_later(number: signal.Signals) -> None:
    request = StopRequest()
    signal.raise_signal(number)
    assert request.received == number

    late = StopRequest()
    late.close()
    signal.raise_signal(number)
    assert late.received == 0
    # Not a function of Python's, which would be taken away before the process ends.
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("others", [0, int(signal.SIGUSR1), stop.FOLDER_LOST])
def test_a_signal_that_comes_while_ranks_agree_is_for_the_next_step(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reduce(flag: torch.Tensor, _operation: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        flag.fill_(others)

    first = others
    request = StopRequest()

    def agreed() -> int:
        wanted = request.wanted(is_lost=others == stop.FOLDER_LOST)
        return request.take(most_of_any_rank([wanted], torch.device("cpu"))[0])

    monkeypatch.setattr(stop.dist, "all_reduce", reduce)
    assert agreed() == others
    others = 0
    monkeypatch.setattr(stop.dist, "all_reduce", lambda _flag, _operation: None)
    assert agreed() == (first % stop.FOLDER_LOST or signal.SIGTERM)


def ends_with(*steps: Callable[[], object]) -> int:
    """The signal that ends a process which asks for stops and then does these things; 0 if none does."""
    pid = os.fork()
    if pid == 0:
        StopRequest()
        for step in steps:
            step()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def interrupt() -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends_with(interrupt, interrupt) == 0, "a terminal and a launcher may both pass one on"
    monkeypatch.setattr(stop, "SAME_INTERRUPT_S", -1.0)
    assert ends_with(lambda: signal.raise_signal(signal.SIGTERM)) == 0
    assert ends_with(interrupt) == signal.SIGINT


def test_a_background_job_goes_on_ignoring_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = StopRequest()
    interrupt()
    assert request.received == 0
    end_quietly_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_until_training_handles_it_an_interrupt_ends_the_process_without_a_traceback() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_quietly_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_a_lost_folder_counts_more_than_any_signal() -> None:
    assert max(signal.valid_signals()) < stop.FOLDER_LOST

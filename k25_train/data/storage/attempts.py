"""How often a read is tried, and how long is waited in between: the one place for it.

Libraries of object stores try again by themselves, too; `fsspec_files.py` switches that off, or a fault that
stays would take the product of all attempts.
"""

import errno
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import Any

from k25_train.data.storage.counts import COUNTS
from k25_train.data.storage.deadline import Deadline, HungReadError

logger = logging.getLogger(__name__)

RETRY_DELAYS_S: Sequence[float] = (1, 2, 4, 8, 15, 30)
"""Waits between attempts to read: a file system that fails over, or a stale handle, is back within a minute,
and a store that is asked too much (S3's 503 SlowDown) wants longer and longer pauses. Our choice; shorter
than any sensible `train.stall_timeout_s`."""
GONE_DELAYS_S: Sequence[float] = (1, 2, 4, 8)
"""The same where what was there when the run began is gone or may no longer be read, which seldom passes."""
HUNG_DELAYS_S: Sequence[float] = (1, 2)
"""The same after a read that did not return: each of `HUNG_READ_ATTEMPTS` costs `data.read_timeout_s`."""
JITTER = 0.25
"""Largest share by which a wait is longer: thousands of ranks that were refused together must not come back
together. Our choice."""
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_PASSING = (TimeoutError, ConnectionError, BlockingIOError, InterruptedError)
_PASSING_NUMBERS = frozenset(
    {
        errno.EIO, errno.ESTALE, errno.EBUSY, errno.EREMOTEIO, errno.ENETDOWN, errno.ENETUNREACH,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ENFILE, errno.EMFILE, errno.ENOMEM,
    }
)  # fmt: skip
_PASSING_NAMES = frozenset(
    {"HTTPClientError", "IncompleteReadError", "ClientPayloadError", "ResponseStreamingError", "ClientError"}
    | {"ResponseParserError", "IncompleteRead", "ConnectionError"}
)
"""Classes of botocore 1.43, aiohttp 3.14 and http.client, by name: without s3fs they are not installed. They
tell of connections that broke; what a server has refused is told by its status."""
_PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})


class ChangedFileError(Exception):
    """A file or object is not the one that was there before; trying again would mix the two."""


def delays_at_start(error: Exception) -> Sequence[float]:
    """Waits after an error at the start: what is wrong then is most likely a setting, and somebody is
    looking."""
    if isinstance(error, HungReadError):
        return HUNG_DELAYS_S
    return RETRY_DELAYS_S if _passes(error) else ()


def delays_in_use(error: Exception) -> Sequence[float]:
    """Waits after an error once the run has begun."""
    if isinstance(error, ChangedFileError):
        return ()
    if isinstance(error, HungReadError):
        return HUNG_DELAYS_S
    return GONE_DELAYS_S if isinstance(error, _GONE) else RETRY_DELAYS_S


def attempt(
    read: Callable[[], Any],
    what: str,
    delays_of: Callable[[Exception], Sequence[float]],
    deadline: Deadline,
    closing: Event,
) -> Any:
    """What `read` gives, tried again as `delays_of` its error says, until `closing` is set.

    `what` names it in warnings. Raises `FailedAttemptsError`.
    """
    num_attempts = 0
    while True:
        try:
            return deadline.run(read)
        except Exception as error:  # file systems of fsspec raise what their libraries do
            delays_s = delays_of(error)
            num_attempts += 1
            if num_attempts > len(delays_s) or closing.is_set():
                raise FailedAttemptsError(error, num_attempts) from error
            delay_s = delays_s[num_attempts - 1]
            COUNTS.add("retries")
            logger.warning(
                "%s: %s; trying again in %g s (%d of %d)",
                what, describe(error), delay_s, num_attempts, len(delays_s),
            )  # fmt: skip
            closing.wait(delay_s * (1 + JITTER * random.SystemRandom().random()))


class FailedAttemptsError(Exception):
    """The last error of all attempts."""

    def __init__(self, error: Exception, num_attempts: int) -> None:
        super().__init__(error, num_attempts)
        self.error = error
        self.num_attempts = num_attempts


def describe(error: BaseException) -> str:
    """An error in a few words: what the system says and its number, or type and text."""
    number = getattr(error, "errno", None)
    if isinstance(error, HungReadError) or not isinstance(number, int) or number not in errno.errorcode:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    code = refusal(error)
    return f"{os.strerror(number)}, {errno.errorcode[number]}" + (f"; the store says {code}" if code else "")


def refusal(error: BaseException) -> str:
    """The code by which an object store has refused a request; empty if it has not."""
    for each in chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _passes(error: BaseException) -> bool:
    return any(map(_passes_itself, chain(error)))


def _passes_itself(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _PASSING_STATUSES
    if isinstance(error, _PASSING) or getattr(error, "errno", None) in _PASSING_NUMBERS:
        return True
    return any(base.__name__ in _PASSING_NAMES for base in type(error).__mro__)

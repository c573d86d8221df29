"""Names, ports and connections, each with a limit in time and an error that says what is wrong.

Standard library only: login nodes and the first node of a job use it too.
"""

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable

from k25_train.errors import K25Error

RESOLVE_S = 10.0
"""Longest time that a name may take to resolve; a resolver without servers takes minutes to give up."""
CONNECT_S = 5.0
"""Longest time of one attempt to connect."""
PROGRESS_S = 10.0
"""Seconds between lines that tell what is waited for."""
RETRY_S = 0.2
"""Pause between attempts to connect."""


class NetworkError(K25Error):
    """A name does not resolve, a port is taken, or something does not answer. The text says what, but not
    which setting it came from."""


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def resolve(host: str) -> list[str]:
    """IP addresses of a host, preferred ones first.

    Raises `NetworkError` if it has none, or if there is no answer within `RESOLVE_S`.
    """
    answers: list[list[str] | OSError | UnicodeError] = []

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            answers.append([str(entry[4][0]) for entry in found])
        except (OSError, UnicodeError) as error:
            answers.append(error)

    # The resolver takes no time limit, hence the thread.
    deadline = time.monotonic() + RESOLVE_S
    while True:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        if not answers:
            raise NetworkError(f"the name {host!r} does not resolve on {own_name()} within {RESOLVE_S:g} s")
        answer = answers.pop()
        if isinstance(answer, list):
            return answer
        is_temporary = isinstance(answer, socket.gaierror) and answer.errno == socket.EAI_AGAIN
        if not is_temporary or time.monotonic() >= deadline - 1.0:
            raise NetworkError(f"the name {host!r} does not resolve on {own_name()} ({answer})") from answer
        time.sleep(1.0)


def endpoint(address: str, port: int) -> str:
    """Address and port in one text, with an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def own_name() -> str:
    """This machine's name."""
    return socket.gethostname()


def listen(port: int) -> socket.socket:
    """Listen at a port on every address of this machine. Raises `NetworkError` if it is taken."""
    listener = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    try:
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # As torch's store does: otherwise a port whose last connection has just closed counts as taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        trouble = getattr(error, "strerror", None) or error
        raise NetworkError(f"port {port} of {own_name()} cannot be opened ({trouble})") from error
    return listener


def check_is_own(host: str, listener: socket.socket) -> None:
    """Check that `host` leads to `listener` of this process, by calling it: its addresses may be another
    machine's or, behind address translation, none that this machine knows of.

    Raises `NetworkError` if it does not.
    """
    port, word = int(listener.getsockname()[1]), secrets.token_bytes(16)
    trouble: object = "another machine answers"
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as client:
            client.sendall(word)
            if _hears(listener, word):
                return
    except OSError as error:
        trouble = error
    finally:
        listener.settimeout(None)
    addresses = ", ".join(dict.fromkeys(resolve(host)))
    raise NetworkError(
        f"{host} ({addresses}) is not this machine, {own_name()}: port {port} there: {trouble}"
    )


def _hears(listener: socket.socket, word: bytes) -> bool:
    """Whether a word arrives. Raises OSError if nothing does."""
    listener.settimeout(1.0)
    deadline = time.monotonic() + CONNECT_S
    while time.monotonic() < deadline:
        accepted, _ = listener.accept()
        with accepted, contextlib.suppress(OSError):
            accepted.settimeout(0.2)
            if accepted.recv(len(word)) == word:
                return True
    return False


def is_listening(host: str, port: int) -> bool:
    """Whether something accepts connections there now."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S):
            return True
    except (OSError, UnicodeError):
        return False


def wait_for(host: str, port: int, limit_s: float, who: str, say: Callable[[str], None] = say) -> None:
    """Return as soon as something listens at a host's port.

    Args:
        host: name or address.
        port: TCP port.
        limit_s: longest time to wait.
        who: who waits for what, for the lines that tell of it: one at the first failure, then one every
            `PROGRESS_S`.
        say: prints a line.

    Raises `NetworkError` if the name does not resolve, or after `limit_s` with the last connection error.
    """
    start_s = time.monotonic()
    told_s = -PROGRESS_S
    while True:
        try:
            with socket.create_connection((host, port), timeout=CONNECT_S):
                return
        except socket.gaierror:
            resolve(host)
            continue
        except (OSError, UnicodeError) as error:
            trouble = error
        waited_s = time.monotonic() - start_s
        if waited_s >= limit_s:
            raise NetworkError(
                f"{own_name()} cannot reach {endpoint(host, port)} ({trouble}) after {limit_s:g} s"
            ) from trouble
        if waited_s - told_s >= PROGRESS_S:
            told_s = waited_s
            say(f"{who} at {endpoint(host, port)} ({trouble}), {waited_s:.0f} of at most {limit_s:g} s")
        time.sleep(RETRY_S)

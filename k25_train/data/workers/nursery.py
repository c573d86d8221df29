"""A process that does nothing but fork workers: it never has threads, so workers may be started at any time.

The reading process has threads once its files are open (fsspec's, the tokenizer's, DALI's), and a child
forked then inherits their locks in whatever state they are. The nursery is forked before. It ends with the
reading process, and workers end with it, by the kernel.
"""

import os
import socket
import struct
import time
from collections.abc import Callable, Sequence

from k25_train.data.child_process import fork

WORKER_NAME = "k25-data-worker"
"""Of workers, where `top` shows names (the kernel keeps 15 characters)."""
_NURSERY_NAME = "k25-nursery"
_NUMBER = struct.Struct("<q")
_REAP_S = 5.0
"""How long a worker whose connection has ended may take to be gone; one in a read that never returns may
take for ever."""
_UNKNOWN = 1 << 20
"""In the place of an exit code, of one that is not gone."""


class Nursery:
    """The reading process's end."""

    def __init__(
        self, work: Callable[[socket.socket, int], None], left_open: Sequence[socket.socket]
    ) -> None:
        """Fork the nursery. Call it while this process has one thread.

        Args:
            work: what a worker does, with its socket and the descriptor of its log.
            left_open: sockets of this process, which nursery and workers must not hold.
        """
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = os.memfd_create("k25-train nursery log")

        def serve() -> None:
            for each in (*left_open, self._socket):
                each.close()
            _serve(theirs, work)

        self.pid = fork(_NURSERY_NAME, log, serve)
        os.close(log)
        theirs.close()

    def start(self, end: socket.socket, log: int) -> int:
        """Start a worker that has the one end of a connection; its number. Raises OSError if there can be no
        other process, or the nursery has ended."""
        socket.send_fds(self._socket, [_NUMBER.pack(0)], [end.fileno(), log])
        return self._answer()

    def ended(self, pid: int) -> str:
        """How a worker that has ended did so."""
        self._socket.send(_NUMBER.pack(pid))
        code = self._answer()
        if code == _UNKNOWN:
            return "has not ended after it was killed: a read in it does not return"
        status = os.waitstatus_to_exitcode(code)
        return f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}"

    def close(self) -> None:
        """End the nursery, and all workers with it."""
        self._socket.close()

    def _answer(self) -> int:
        data = self._socket.recv(_NUMBER.size)
        if not data:
            raise ConnectionError("the process that starts workers has ended")
        number: int = _NUMBER.unpack(data)[0]
        if number < 0:
            raise OSError(-number, os.strerror(-number))
        return number


def _serve(own: socket.socket, work: Callable[[socket.socket, int], None]) -> None:
    while True:
        data, descriptors, _, _ = socket.recv_fds(own, _NUMBER.size, 2)
        if not data:
            return
        (pid,) = _NUMBER.unpack(data)
        own.send(_NUMBER.pack(_reap(pid) if pid else _start(own, work, descriptors)))


def _start(own: socket.socket, work: Callable[[socket.socket, int], None], descriptors: list[int]) -> int:
    """The worker's number, or the negative number of the system's error."""
    number, log = descriptors

    def body() -> None:
        own.close()
        work(socket.socket(fileno=number), log)

    try:
        return fork(WORKER_NAME, log, body)
    except OSError as error:
        return -(error.errno or 1)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _reap(pid: int) -> int:
    until_s = time.monotonic() + _REAP_S
    while time.monotonic() < until_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    return _UNKNOWN

"""The first process of a sandbox: starts commands, bounds what they print, and hands over files.

    python session_init.pyc CONTROL PROCESSES [PORT …]

Runs within, as process 1 of its own, so that nothing else there can kill it and all that is orphaned there is
its child. It takes orders from the open file CONTROL, a stream socket, and ends when that does, and with it
everything else. Its answers are not believed by whoever reads them: what it guards it could also be made to
say. PROCESSES bounds processes of the user where it is not 0. For each PORT it opens a socket that listens on
the loopback within and hands it out, so that its other end can be outside without a network.

The standard library alone, and of that what loads in a millisecond: a sandbox has to start in tens.

A frame is a size (4 bytes), a kind (1), a number that orders and answers have in common (4), and content:

    orders                                               answers
    R command, variables, seconds, room, stdin, closes   O, E output and error; X ending, status, is full
    I more input     C no more input     K kill it
    W path           w content           c that was all  . done, or F name of an error, its text
    G path, most     S most                              N path, D content, . done, or F
"""

from __future__ import annotations

import marshal
import os
import select
import stat
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_HEADER = 9
_PIECE = 1 << 16
_KILL = 9
_SIGPIPE, _SIGXFSZ = 13, 25
"""Python ignores these; a command has them as usual."""
_NICENESS = 10
"""Of commands, so that this process answers while they keep every processor busy."""
_FILE_OVERHEAD = 256
"""Bytes that a file counts for in a snapshot, its content apart."""


class Command:
    """A command that has been started."""

    def __init__(self, number: int, pid: int, files: tuple[int, int, int], seconds: float, room: int) -> None:
        """`files` are its input, output and error; without limits `seconds` and `room` are 0."""
        self.number = number
        self.pid = pid
        self.process = os.pidfd_open(pid)
        self.stdin, self.stdout, self.stderr = files
        self.input = bytearray()
        self.closes_input = False
        self.deadline = time.monotonic() + seconds if seconds else 0.0
        self.room = room or -1
        self.ending = "exited"

    def kinds(self) -> list[tuple[int, bytes]]:
        """Its open outputs with the kind of frame that they fill."""
        return [(file, kind) for file, kind in ((self.stdout, b"O"), (self.stderr, b"E")) if file >= 0]


class Init:
    """The loop."""

    def __init__(self, control: int) -> None:
        """`control` is the open socket."""
        self._control = control
        self._commands: dict[int, Command] = {}
        self._files: dict[int, tuple[int, str]] = {}
        self._orders: dict[bytes, Callable[[int, bytes], None]] = {
            b"R": self._run, b"I": self._more, b"C": self._no_more, b"K": self._kill,
            b"W": self._write, b"w": self._content, b"c": self._written,
            b"G": self._read, b"S": self._snapshot,
        }  # fmt: skip

    def serve(self) -> None:
        """Until the other end is gone."""
        while True:
            now = time.monotonic()
            for command in list(self._commands.values()):
                if command.deadline and now >= command.deadline and command.ending == "exited":
                    self._end(command, "time")
            ready = self._wait(now)
            if ready.get(self._control):
                self._obey()
            for command in list(self._commands.values()):
                if command.stdin >= 0 and ready.get(command.stdin):
                    self._feed(command)
                for file, kind in command.kinds():
                    if ready.get(file):
                        self._take(command, file, kind)
            self._reap()

    def _wait(self, now: float) -> dict[int, int]:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        # Orphans are buried in passing, so that a wait ends now and then.
        until = now + (0.5 if self._commands else 5.0)
        for command in self._commands.values():
            poll.register(command.process, select.POLLIN)
            for file, _ in command.kinds():
                poll.register(file, select.POLLIN)
            if command.stdin >= 0 and command.input:
                poll.register(command.stdin, select.POLLOUT)
            if command.deadline and command.ending == "exited":
                until = min(until, command.deadline)
        return dict(poll.poll(max(0.0, until - now) * 1000 + 1))

    def _obey(self) -> None:
        head = self._exactly(_HEADER)
        size, number = int.from_bytes(head[:4], "big"), int.from_bytes(head[5:], "big")
        self._orders[head[4:5]](number, self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            piece = os.read(self._control, min(size - len(content), 1 << 20))
            if not piece:
                os._exit(0)
            content += piece
        return bytes(content)

    def send(self, kind: bytes, number: int, content: bytes = b"") -> None:
        """A frame; ends the process if there is nobody to take it."""
        frame = memoryview(len(content).to_bytes(4, "big") + kind + number.to_bytes(4, "big") + content)
        try:
            while frame:
                frame = frame[os.write(self._control, frame) :]
        except OSError:
            os._exit(0)

    # Commands.

    def _run(self, number: int, content: bytes) -> None:
        argv, variables, seconds, room, stdin, closes = marshal.loads(content)
        (given, feeds), (out, prints), (err, complains) = os.pipe(), os.pipe(), os.pipe()
        ours, theirs = (feeds, out, err), (given, prints, complains)
        try:
            pid = os.posix_spawnp(
                argv[0],
                argv,
                {**os.environ, **variables},
                file_actions=[(os.POSIX_SPAWN_DUP2, file, place) for place, file in enumerate(theirs)],
                setsid=True,
                setsigdef=(_SIGPIPE, _SIGXFSZ),
            )
        except (OSError, ValueError) as error:
            for file in (*ours, *theirs):
                os.close(file)
            missing = isinstance(error, FileNotFoundError)
            self.send(b"E", number, f"{argv[0]!r} cannot be started: {error}\n".encode(errors="replace"))
            self._ended(number, "exited", 127 if missing else 126)
            return
        for file in theirs:
            os.close(file)
        _tried(lambda: os.setpriority(os.PRIO_PROCESS, pid, _NICENESS))
        for file in ours:
            os.set_blocking(file, False)
        command = self._commands[number] = Command(number, pid, ours, seconds, room)
        command.input += stdin
        command.closes_input = closes
        self._feed(command)

    def _more(self, number: int, content: bytes) -> None:
        if (command := self._commands.get(number)) and command.stdin >= 0:
            command.input += content
            self._feed(command)

    def _no_more(self, number: int, _: bytes) -> None:
        if (command := self._commands.get(number)) and command.stdin >= 0:
            command.closes_input = True
            self._feed(command)

    def _kill(self, number: int, _: bytes) -> None:
        if command := self._commands.get(number):
            self._end(command, "killed")

    def _feed(self, command: Command) -> None:
        try:
            while command.input:
                del command.input[: os.write(command.stdin, command.input[:_PIECE])]
        except BlockingIOError:
            return
        except OSError:
            command.input.clear()
            command.closes_input = True
        if command.closes_input:
            os.close(command.stdin)
            command.stdin = -1

    def _take(self, command: Command, file: int, kind: bytes) -> bool:
        """Pass on what it has printed; returns whether there may be more now."""
        try:
            piece = os.read(file, _PIECE)
        except BlockingIOError:
            return False
        if not piece:
            os.close(file)
            if kind == b"O":
                command.stdout = -1
            else:
                command.stderr = -1
            return False
        if command.room >= 0:
            piece, more = piece[: command.room], len(piece) > command.room
            command.room -= len(piece)
            if more and command.ending == "exited":
                self._end(command, "output")
        if piece:
            self.send(kind, command.number, piece)
        return command.ending == "exited"

    def _end(self, command: Command, ending: str) -> None:
        """Kill it with all that it has started and that has not left its family."""
        command.ending = ending
        for _ in range(20):
            family = _family(command.pid)
            if not family:
                return
            for pid in family:
                _killed(pid)
            time.sleep(0.002)
        # It starts more than can be counted: everything but this process goes.
        _killed(-1)

    def _reap(self) -> None:
        statuses: dict[int, int] = {}
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                statuses[pid] = status
        except ChildProcessError:
            pass
        for command in [command for command in self._commands.values() if command.pid in statuses]:
            for file, kind in command.kinds():
                while self._take(command, file, kind):
                    pass
            for file in (command.stdin, command.stdout, command.stderr, command.process):
                if file >= 0:
                    os.close(file)
            del self._commands[command.number]
            status = os.waitstatus_to_exitcode(statuses[command.pid])
            self._ended(command.number, command.ending, status if status >= 0 else 128 - status)

    def _ended(self, number: int, ending: str, status: int) -> None:
        is_full = int(os.statvfs(".").f_bavail == 0)
        self.send(b"X", number, f"{ending} {status} {is_full}".encode())

    # Files.

    def _try(self, number: int, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, ValueError) as error:
            text = f"{type(error).__name__}\n{error}"
            self.send(b"F", number, text.encode(errors="replace"))
        else:
            self.send(b".", number)

    def _write(self, number: int, content: bytes) -> None:
        path = os.fsdecode(content)

        def begin() -> None:
            if folder := os.path.dirname(path):
                os.makedirs(folder, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
            self._files[number] = (file, "")
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ValueError(f"{path!r} is no file")

        try:
            begin()
        except (OSError, ValueError) as error:
            file = self._files.get(number, (-1, ""))[0]
            self._files[number] = (file, f"{type(error).__name__}\n{error}")

    def _content(self, number: int, content: bytes) -> None:
        file, fault = self._files[number]
        if fault:
            return
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError as error:
            self._files[number] = (file, f"{type(error).__name__}\n{error}")

    def _written(self, number: int, _: bytes) -> None:
        file, fault = self._files.pop(number)
        if file >= 0:
            os.close(file)
        self.send(b"F" if fault else b".", number, fault.encode(errors="replace"))

    def _read(self, number: int, content: bytes) -> None:
        path, most = marshal.loads(content)

        def work() -> None:
            self._hand_over(number, path, most, os.open(path, os.O_RDONLY | os.O_NONBLOCK))

        self._try(number, work)

    def _snapshot(self, number: int, content: bytes) -> None:
        most = int(content)

        def walk() -> None:
            left = most
            for folder, _, names in os.walk("."):
                for name in names:
                    path = os.path.join(folder, name)
                    try:
                        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                    except OSError:
                        continue
                    if not stat.S_ISREG(os.fstat(file).st_mode):
                        os.close(file)
                        continue
                    left -= _FILE_OVERHEAD + len(os.fsencode(path))
                    if left < 0:
                        os.close(file)
                        raise ValueError(f"there are more files than {most} bytes hold")
                    self.send(b"N", number, os.fsencode(path)[2:])
                    left -= self._hand_over(number, path, left, file)

        self._try(number, walk)

    def _hand_over(self, number: int, path: str, most: int, file: int) -> int:
        """Send a regular file that is open, and close it; returns its length."""
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ValueError(f"{path!r} is no file")
            length = 0
            while piece := os.read(file, _PIECE):
                length += len(piece)
                if length > most:
                    raise ValueError(f"{path!r} is longer than {most} bytes")
                self.send(b"D", number, piece)
            return length
        finally:
            os.close(file)


def _family(pid: int) -> list[int]:
    """Living processes of a session, and all that descends from its first process."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent, _, session = file.read().rpartition(b")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if state not in (b"Z", b"X"):
            parents[int(name)] = int(parent)
            if int(session) == pid or int(name) == pid:
                found.add(int(name))
    size = -1
    while size != len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return [each for each in found if each > 1]


def _killed(pid: int) -> None:
    _tried(lambda: os.kill(pid, _KILL))


def _tried(call: Callable[[], None]) -> None:
    try:
        call()
    except OSError:
        return


def _limit_processes(most: int) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    least = most if hard == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(resource.RLIMIT_NPROC, (least, least))


def _listening(ports: list[int]) -> list[Any]:
    import _socket

    sockets = []
    for port in ports:
        opened = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        opened.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        opened.bind(("127.0.0.1", port))
        opened.listen(128)
        sockets.append(opened)
    return sockets


def _hand_out(control: int, sockets: list[Any]) -> None:
    """Say that this process is there, and give away the sockets."""
    import _socket

    line = _socket.socket(fileno=os.dup(control))
    numbers = b"".join(opened.fileno().to_bytes(4, sys.byteorder) for opened in sockets)
    hello = (0).to_bytes(4, "big") + b"H" + (0).to_bytes(4, "big")
    line.sendmsg([hello], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])
    for opened in (*sockets, line):
        opened.close()


def main() -> None:
    """See the head of this file."""
    control, processes, *ports = map(int, sys.argv[1:])
    os.set_inheritable(control, False)
    if processes:
        _limit_processes(processes)
    init = Init(control)
    if ports:
        _hand_out(control, _listening(ports))
    else:
        init.send(b"H", 0)
    init.serve()


if __name__ == "__main__":
    main()

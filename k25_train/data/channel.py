"""Messages between two processes of one rank whose arrays are not copied when they arrive.

A message is an object and all arrays in it, written into shared memory (`regions.py`); the socket carries the
place alone. Both ends are of one rank: the process that reads is forked from the one that it reads for.
"""

import errno
import io
import os
import pickle
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k25_train.data.regions import Received, Written

_PLACE = struct.Struct("<QQQQ")
"""Number of the region, bytes in it, and numbers of regions that follow: dropped ones, and freed ones of the
other direction."""
_MAX_BYTES = 65536
_HEADER = struct.Struct("<QQ")
"""At the start of a message: bytes of the pickled object, and number of arrays. Their sizes follow."""
_ALIGNMENT = 64
"""Of every array, in bytes."""


class Letter(NamedTuple):
    """A message that is written and not yet passed on."""

    region: int
    """Number of the region that it is in."""
    num_bytes: int
    """From the region's start on."""


class Channel:
    """One end. Sends and receives one message at a time."""

    def __init__(self, end: socket.socket) -> None:
        """`end` of a pair of the type SOCK_SEQPACKET."""
        self._socket = end
        self._written = Written()
        self.received = Received()
        """Memory that messages arrive in."""

    @classmethod
    def pair(cls) -> "tuple[Channel, Channel]":
        """Two ends that are connected."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    def fileno(self) -> int:
        """For `readable`: there is something when a message is there, or the other end is gone."""
        return self._socket.fileno()

    @property
    def socket(self) -> socket.socket:
        """What carries the places of messages."""
        return self._socket

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def send(self, message: object) -> None:
        """Write a message into memory and pass it on. Raises OSError if the other end is gone."""
        self.pass_on(self.write(message))

    def write(self, message: object) -> Letter:
        """Write a message into memory, ahead of the time at which it is passed on."""
        data, arrays = _dump(message)
        head = _HEADER.pack(len(data), len(arrays))
        head += struct.pack(f"<{len(arrays)}Q", *(array.nbytes for array in arrays)) + data
        places, num_bytes = _places(len(head), [array.nbytes for array in arrays])
        region = self._written.take(num_bytes)
        region.memory[: len(head)] = head
        for place, array in zip(places, arrays, strict=True):
            region.memory[place : place + array.nbytes] = array
        return Letter(region.number, num_bytes)

    def drop(self, letter: Letter) -> None:
        """Pass on nothing: the message is not wanted any more."""
        self._written.free(letter.region)

    def pass_on(self, letter: Letter) -> None:
        """Tell the other end where a written message is. Raises OSError if it is gone."""
        # Along with what this end no longer uses.
        descriptor, dropped = self._written.news_of(letter.region)
        freed = self.received.freed()
        numbers = struct.pack(f"<{len(dropped) + len(freed)}Q", *dropped, *freed)
        place = _PLACE.pack(*letter, len(dropped), len(freed)) + numbers
        try:
            socket.send_fds(self._socket, [place], [] if descriptor is None else [descriptor])
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def receive(self) -> Any:
        """The next message; its arrays stay in the memory that it came in.

        Raises EOFError if the other end is gone, and OSError if its memory cannot be mapped; the message is
        lost then.
        """
        # 1. Where it is.
        place, descriptors, flags, _ = socket.recv_fds(self._socket, _MAX_BYTES, 1)
        if not place:
            raise EOFError
        if flags & socket.MSG_CTRUNC:
            # The kernel drops a descriptor for which the process has no number left.
            raise OSError(errno.EMFILE, "too many files are open: raise the limit (ulimit -n)")
        number, num_bytes, num_dropped, num_freed = _PLACE.unpack_from(place)
        numbers = struct.unpack_from(f"<{num_dropped + num_freed}Q", place, _PLACE.size)
        for dropped in numbers[:num_dropped]:
            self.received.drop(dropped)
        for freed in numbers[num_dropped:]:
            self._written.free(freed)
        for descriptor in descriptors:
            self.received.map(number, descriptor)
            os.close(descriptor)
        # 2. The object around its arrays.
        memory = self.received.view(number, num_bytes)
        num_data_bytes, num_arrays = _HEADER.unpack_from(memory)
        sizes = struct.unpack_from(f"<{num_arrays}Q", memory, _HEADER.size)
        start = _HEADER.size + 8 * num_arrays
        places, _ = _places(start + num_data_bytes, sizes)
        arrays = [memory[at : at + size] for at, size in zip(places, sizes, strict=True)]
        return pickle.loads(memory[start : start + num_data_bytes], buffers=arrays)


class _Pickler(pickle.Pickler):
    """Takes tensors for arrays, whose bytes are left out of the pickle."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor:
            return NotImplemented
        if not obj.numel():
            return _without_elements, (tuple(obj.shape), obj.dtype)
        return torch.from_numpy, (obj.contiguous().numpy(),)


def _without_elements(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def can_be_sent(error: BaseException) -> bool:
    """Whether the other end can raise the same error: a library's may hold a connection, or ask for other
    arguments than it keeps."""
    try:
        pickle.loads(_dump(error)[0])
    except Exception:  # whatever a library's class does
        return False
    return True


def _dump(message: object) -> tuple[bytes, list[memoryview]]:
    """A message without its arrays, and these."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(message)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def _places(start: int, sizes: "list[int] | tuple[int, ...]") -> tuple[list[int], int]:
    """Where each array goes behind the first `start` bytes, and where the last one ends."""
    places = []
    for size in sizes:
        start = -(-start // _ALIGNMENT) * _ALIGNMENT
        places.append(start)
        start += size
    return places, start


def readable(channels: Sequence[Channel], timeout_s: float) -> list[Channel]:
    """Those that have a message, or whose other end is gone, once there is one; none when the time is over.

    `select` would refuse file descriptors from 1024 on, which a rank with many files and sockets has.
    """
    by_descriptor = {channel.fileno(): channel for channel in channels}
    poll = select.poll()
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return [by_descriptor[descriptor] for descriptor, _ in poll.poll(1000 * timeout_s)]

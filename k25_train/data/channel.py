"""Messages between two processes of one rank whose arrays are not copied when they arrive.

A message is an object and all arrays in it, written into memory that the receiver maps (an anonymous file,
which needs no room in /dev/shm and is gone when nobody holds it, however its holders end); the socket carries
its descriptor alone. Both ends are of one rank: the reader is forked from the process that it reads for.
"""

import io
import mmap
import os
import pickle
import socket
import struct
from typing import Any

import torch
from torch import Tensor

_HEADER = struct.Struct("<QQ")
"""Bytes of the pickled object, and number of arrays; their sizes follow."""
_ALIGNMENT = 64
"""Of every array, in bytes."""


class Channel:
    """One end. Sends and receives one message at a time."""

    def __init__(self, end: socket.socket) -> None:
        """`end` of a pair of the type SOCK_SEQPACKET."""
        self._socket = end

    @classmethod
    def pair(cls) -> "tuple[Channel, Channel]":
        """Two ends that are connected."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    def fileno(self) -> int:
        """For `select`: readable when a message is there, or the other end is gone."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def send(self, message: object) -> None:
        """Write a message into memory and pass it on. Raises OSError if the other end is gone."""
        data, arrays = _dump(message)
        sizes = struct.pack(f"<{len(arrays)}Q", *(array.nbytes for array in arrays))
        places, num_bytes = _places(_HEADER.size + len(sizes) + len(data), arrays)
        descriptor = os.memfd_create("k25-train data")
        try:
            os.ftruncate(descriptor, num_bytes)
            with mmap.mmap(descriptor, num_bytes) as memory:
                head = _HEADER.pack(len(data), len(arrays)) + sizes + data
                memory[: len(head)] = head
                for place, array in zip(places, arrays, strict=True):
                    memory[place : place + array.nbytes] = array
            socket.send_fds(self._socket, [struct.pack("<Q", num_bytes)], [descriptor])
        finally:
            os.close(descriptor)

    def receive(self) -> Any:
        """The next message; its arrays stay in the memory that it came in. Raises EOFError if the other end
        is gone."""
        header, descriptors, *_ = socket.recv_fds(self._socket, 8, 1)
        if not header:
            raise EOFError
        (descriptor,) = descriptors
        try:
            # Mapped at once: page by page it would take as long as a copy.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            memory = memoryview(mmap.mmap(descriptor, *struct.unpack("<Q", header), flags=flags))
        finally:
            os.close(descriptor)
        num_data_bytes, num_arrays = _HEADER.unpack(memory[: _HEADER.size])
        sizes = struct.unpack_from(f"<{num_arrays}Q", memory, _HEADER.size)
        start = _HEADER.size + 8 * num_arrays
        arrays, place = [], start + num_data_bytes
        for size in sizes:
            place = -(-place // _ALIGNMENT) * _ALIGNMENT
            arrays.append(memory[place : place + size])
            place += size
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


def _dump(message: object) -> tuple[bytes, list[memoryview]]:
    """A message without its arrays, and these."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(message)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def _places(start: int, arrays: list[memoryview]) -> tuple[list[int], int]:
    """Where each array goes behind the first `start` bytes, and where the last one ends."""
    places = []
    for array in arrays:
        start = -(-start // _ALIGNMENT) * _ALIGNMENT
        places.append(start)
        start += array.nbytes
    return places, start

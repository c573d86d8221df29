"""A cache bounded by bytes: entries differ by orders of magnitude, so a number of them bounds nothing."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable


class ByteCache[Value]:
    """Keeps the values used last. Safe across threads; two may make the same value at once."""

    def __init__(self, max_bytes: int, num_bytes: Callable[[Value], int]) -> None:
        """`num_bytes`: what a value takes; one larger than `max_bytes` is not kept."""
        self._max_bytes = max_bytes
        self._num_bytes = num_bytes
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self.held_bytes = 0
        """Bytes of all values kept."""

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`, made if it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        num_bytes = self._num_bytes(value)
        with self._lock:
            if key not in self._values and num_bytes <= self._max_bytes:
                self._values[key] = value
                self.held_bytes += num_bytes
            while self.held_bytes > self._max_bytes:
                _, dropped = self._values.popitem(last=False)
                self.held_bytes -= self._num_bytes(dropped)
        return value

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._values.clear()
            self.held_bytes = 0

"""Large arrays in memory that is used again: the kernel clears fresh memory page by page, which costs more
than filling it."""

import weakref

import numpy as np

_HEADROOM = 1.25
"""By how much memory is larger than what it is made for. Our choice, as of regions."""


class ReusedMemory:
    """Gives arrays, and takes their memory back when nobody holds them any more. Of one thread."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def array(self, num_rows: int, num_columns: int) -> np.ndarray:
        """[num_rows, num_columns] uint8, not initialised."""
        count = num_rows * num_columns
        number = next((i for i, each in enumerate(self._free) if len(each) >= count), None)
        if number is not None:
            memory = self._free.pop(number)
        else:
            # All free ones are too small, and would be for what comes next.
            self._free.clear()
            memory = np.empty(int(_HEADROOM * count), dtype=np.uint8)
        # Whoever holds a part of it holds this object; a view of the array itself would hold the array alone.
        array = np.frombuffer(memoryview(memory), dtype=np.uint8, count=count)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(num_rows, num_columns)

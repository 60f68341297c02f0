"""A store of your own: any bytes that can be read by offset become an array.

The store runs in a process of its own (the external pager), so that nothing on the fault path
waits for Python. It is pickled: define it in a module, as here, or install `quire[pickle]`.
"""

import numpy as np

import quire


class Squares(quire.Store):
    """The squares of the natural numbers, computed when they are touched."""

    def __init__(self, count: int) -> None:
        self.count = count

    @property
    def size(self) -> int:
        return 8 * self.count

    @property
    def label(self) -> str:
        return f"squares below {self.count}"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        first, last = offset // 8, -(-(offset + len(buffer)) // 8)
        squares = np.arange(first, last, dtype=np.int64) ** 2
        start = offset - 8 * first
        buffer[:] = squares.view(np.uint8)[start : start + len(buffer)].data


if __name__ == "__main__":
    with quire.open(Squares(100_000_000), dtype=np.int64, budget="64 MiB") as m:
        x = m.array
        print(f"x[12_345_678] = {x[12_345_678]}, of {x.nbytes:,} bytes")
        assert x[12_345_678] == 12_345_678**2

"""One array in several processes, without copying it.

Workers get a reference to a segment of shared memory, write their parts of it, and end. Nothing has
to be unlinked: the segment is gone with its last holder.
"""

import multiprocessing

import numpy as np

import quire


def fill(segment: quire.SharedMapping, part: int) -> None:
    """Writes one row of the array."""
    segment.array[part] = np.sqrt(np.arange(segment.shape[1])) * part


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with quire.shared(shape=(4, 1_000_000), dtype="f8") as segment:
        workers = [context.Process(target=fill, args=(segment, part)) for part in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        table = segment.array
        assert (table[3] == 3 * table[1]).all()
        print(f"{segment.size_bytes:,} bytes, sum {table.sum():,.0f}")
        del table

    quire.shared("table", "1 MiB").close()
    try:
        quire.shared("table", create=False)
    except quire.SourceError as error:
        print(error)

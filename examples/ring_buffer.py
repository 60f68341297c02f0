"""A producer and a consumer with a ring buffer between them, and no copies.

Records of 3,000 samples are written into the ring and looked at where they lie; the memory is
mapped twice, so that a record which goes past the end is one array all the same.
"""

import threading

import numpy as np

import quire

RECORDS, SAMPLES = 500, 3000
RECORD_BYTES = SAMPLES * 4

with quire.Ring("64 KiB") as ring:

    def produce() -> None:
        """Fills record after record with its number."""
        for number in range(RECORDS):
            ring.wait_writable(RECORD_BYTES)
            with ring.reserve(RECORD_BYTES) as room:
                np.frombuffer(room, "f4")[:] = number
            ring.commit(RECORD_BYTES)

    producer = threading.Thread(target=produce)
    producer.start()
    total = 0.0
    for number in range(RECORDS):
        ring.wait_readable(RECORD_BYTES)
        with ring.peek(RECORD_BYTES) as view:
            samples = np.frombuffer(view, "f4")
            assert samples[0] == samples[-1] == number
            total += float(samples.mean())
            del samples
        ring.consume(RECORD_BYTES)
    producer.join()
    print(f"{RECORDS} records through {ring.size_bytes:,} bytes, sum of means {total:,.0f}")

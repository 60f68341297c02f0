"""A key-value store in one mapped file: a log of records, and an index of it in memory.

    record:  CRC-32 of the rest | length of the key | length of the value | key | value

A put goes to the end of the log and costs no system call; `sync` makes what was put durable. After
a crash the log is read up to the first record whose checksum is wrong; what follows, a torn tail,
was never durable and is dropped. The file grows in place, as addresses for it are held
(``reserve=``). One process at a time.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import quire

HEADER = struct.Struct("<III")
CRC_BYTES = 4
DELETED = 0xFFFFFFFF  # in place of a value's length
GROWTH_BYTES = 1 << 20
ADDRESSES = "64 GiB"


class Store:
    """Bytes by key; a context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens or makes the store; BlockingIOError while another process has it open."""
        self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._log = quire.map(self._file, sharing="shared", protection="rw", reserve=ADDRESSES)
        except BaseException:
            self._file.close()
            raise
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = self._synced = 0
        while self._replay_record():
            pass
        self.dropped = len(torn := self._log.read(self._end).rstrip(b"\0"))
        self._log.write(bytes(len(torn)), self._end)
        self._log.sync()

    def __setitem__(self, key: bytes, value: bytes) -> None:
        """Puts; durable after the next `sync`."""
        self._places[bytes(key)] = (self._append(key, value, len(value)), len(value))

    def __getitem__(self, key: bytes) -> bytes:
        return self._log.read(*self._places[key])

    def __delitem__(self, key: bytes) -> None:
        del self._places[key]
        self._append(key, b"", DELETED)

    def sync(self) -> None:
        """Makes everything that was put durable. After a failure the store must be opened again."""
        try:
            self._log.sync(self._synced, self._end - self._synced)
        except quire.Error:
            self._log.close()  # Linux may tell of it once only, and mark the pages clean
            raise
        self._synced = self._end

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self._log.closed:
                self.sync()
        finally:
            self._log.close()
            self._file.close()

    def _append(self, key: bytes, value: bytes, value_bytes: int) -> int:
        """Writes a record behind the last one; where its value is."""
        if not key or len(value) >= DELETED:
            raise ValueError("a key has at least one byte, and a value less than 4 GiB")
        body = HEADER.pack(0, len(key), value_bytes)[CRC_BYTES:] + key + value
        record = zlib.crc32(body).to_bytes(CRC_BYTES, "little") + body
        if (more := self._end + len(record) - len(self._log)) > 0:
            self._log.resize(len(self._log) + max(GROWTH_BYTES, more))
        self._log.write(record, self._end)  # a full disk raises here, and nothing has changed
        self._end += len(record)
        return self._end - len(value)

    def _replay_record(self) -> bool:
        """Takes up the next record; false when there is no whole one."""
        header = self._log.read(self._end, min(HEADER.size, len(self._log) - self._end))
        crc, key_bytes, value_bytes = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
        length = 0 if value_bytes == DELETED else value_bytes
        value_at = self._end + HEADER.size + key_bytes
        if key_bytes == 0 or value_at + length > len(self._log):
            return False
        start = self._end + CRC_BYTES
        body = self._log.read(start, value_at + length - start)
        if zlib.crc32(body) != crc:
            return False
        key = body[HEADER.size - CRC_BYTES :][:key_bytes]
        self._places[key] = (value_at, length)
        if value_bytes == DELETED:
            del self._places[key]
        self._end = self._synced = value_at + length
        return True


def main() -> None:
    """Kills a process that puts, tears the last record, and looks what is left."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store.log")
        argv = [sys.executable, __file__, path]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
            lines = [child.stdout.readline() for _ in range(300)] if child.stdout else []
            child.kill()
        with Store(path) as store:
            assert all(len(store[line.strip()]) == 10_000 for line in lines)
            print(f"killed after {len(lines)} puts, and all are there")
            store[b"last"] = b"to be torn"
            end = store._end
        with path.open("r+b") as file:  # as if the disk had got only one of two pages
            file.seek(end - 4)
            file.write(bytes(4))
        with Store(path) as store:
            assert b"last" not in store._places
            print(f"a torn record was dropped, {store.dropped} bytes of it")


def put_until_killed(path: str) -> None:
    """Says which puts are durable."""
    with Store(path) as store:
        for number in range(1 << 60):
            store[b"%d" % number] = os.urandom(10_000)
            store.sync()
            print(number, flush=True)


if __name__ == "__main__":
    put_until_killed(sys.argv[1]) if len(sys.argv) > 1 else main()

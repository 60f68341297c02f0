"""`pack`: writes a file in the Zstandard seekable format, in parallel and atomically.

```
frame 0 | frame 1 | ... | frame n-1 | seek table (a skippable frame)
```

Each frame is complete and holds the same number of bytes but the last, so any frame can be
decompressed by itself and any zstd tool can decompress the whole. The seek table holds the sizes
of all frames and, if wanted, a checksum of each
(https://github.com/facebook/zstd/blob/dev/contrib/seekable_format/zstd_seekable_compression_format.md).
"""

from __future__ import annotations

import os
import secrets
import stat
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias

from quire import _core
from quire.errors import Error, FormatError, SourceError
from quire.sizes import SizeLike, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["FRAME_BYTES", "PackResult", "pack"]

Progress: TypeAlias = "Callable[[int, int | None], object]"

FRAME_BYTES = 256 << 10
"""Default size of a frame; a touch of one byte decompresses a whole one.

Measured on 96 MiB of Python sources at level 3: 64 KiB frames pack 4.21 to 1, 256 KiB 4.48 and
1 MiB 4.68, while a random touch takes 0.25 ms of both smaller sizes and 1.15 ms of 1 MiB.
"""
FRAME_BYTES_MAX = 1 << 30
FRAMES_MAX = 0x8000000
LEVELS = range(-131072, 23)
FRAMES_AHEAD = 2
"""Frames under way for each thread: what bounds the memory."""
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Reader(Protocol):
    """The one method of a binary file that is needed."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


@dataclass(frozen=True)
class PackResult:
    """What was written.

    Attributes:
        source_bytes: bytes of the source, after decompression if it was compressed.
        packed_bytes: bytes of the file written.
        frames: number of frames.
        frame_bytes: bytes of the source in each of them, but the last.
    """

    source_bytes: int
    packed_bytes: int
    frames: int
    frame_bytes: int


def pack(
    source: str | os.PathLike[str] | Reader,
    destination: str | os.PathLike[str],
    *,
    frame: SizeLike = FRAME_BYTES,
    level: int = 3,
    threads: int | None = None,
    checksum: bool = True,
    progress: Progress | None = None,
) -> PackResult:
    """Compresses ``source`` into ``destination``, a file that `quire.open` maps.

    The file appears under its name when it is complete and on the disk; after an error or Ctrl-C
    there is nothing new. A source that is compressed by zstd is decompressed first.

    Args:
        source: a path or an open binary file, of any content.
        destination: a path; an existing file is replaced.
        frame: bytes of the source in a frame, an int or text such as "256 KiB": small ones make
            random touches fast, large ones compress better.
        level: of zstd, up to 22; negative levels are faster.
        threads: that compress; one for each usable CPU when absent.
        checksum: whether the seek table holds a checksum of each frame, verified at each read.
        progress: called in this thread with the bytes of the source that are done and their total,
            None when that is not known.

    Raises:
        quire.SourceError: the source cannot be read.
        quire.FormatError: the source is damaged zstd.
        quire.Error: the destination cannot be written; carries errno.
        ValueError, TypeError: an argument is out of range or of the wrong type.

    Threads: may be called from any; memory is about six frames for each compressing thread.

    >>> import numpy
    >>> numpy.save("/tmp/quire-example.npy", numpy.zeros(1_000_000))
    >>> pack("/tmp/quire-example.npy", "/tmp/quire-example.npy.zst", frame="1 MiB").frames
    8
    """
    frame_bytes = parse_size(frame, name="frame")
    if not 1 <= frame_bytes <= FRAME_BYTES_MAX:
        raise ValueError(f"frame of {frame_bytes} bytes is outside 1 to {FRAME_BYTES_MAX}")
    if level not in LEVELS:
        raise ValueError(f"level {level} is outside {LEVELS.start} to {LEVELS.stop - 1}")
    threads = usable_cpus() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    target = _target_path(destination, source)
    with _opened(source) as (reader, label, total), _replacing(target) as file:
        blocks = _blocks(_decompressed(reader, label), frame_bytes, label)
        return _write(file, blocks, frame_bytes, level, threads, checksum, _told(progress, total))


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def _write(
    file: IO[bytes],
    blocks: Iterator[bytes],
    frame_bytes: int,
    level: int,
    threads: int,
    checksum: bool,
    told: Callable[[int], object],
) -> PackResult:
    """Compresses ``blocks`` in threads and writes the frames in their order."""
    entries: list[tuple[int, int, int | None]] = []
    under_way: deque[tuple[int, Future[tuple[bytes, int]]]] = deque()
    source_bytes = packed_bytes = 0

    def write_oldest() -> None:
        nonlocal source_bytes, packed_bytes
        length, future = under_way.popleft()
        frame, frame_checksum = future.result()
        file.write(frame)
        entries.append((len(frame), length, frame_checksum if checksum else None))
        source_bytes += length
        packed_bytes += len(frame)
        told(source_bytes)

    executor = ThreadPoolExecutor(threads, thread_name_prefix="quire-pack")
    try:
        for block in blocks:
            if len(under_way) >= threads * FRAMES_AHEAD:
                write_oldest()
            if len(entries) + len(under_way) >= FRAMES_MAX:
                raise ValueError(
                    f"the source has more than {FRAMES_MAX:,} frames of {format_size(frame_bytes)}:"
                    " choose a larger frame"
                )
            future = executor.submit(_core.compress_frame, block, level)
            under_way.append((len(block), future))
        while under_way:
            write_oldest()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    table = _core.encode_seek_table(entries)
    file.write(table)
    return PackResult(source_bytes, packed_bytes + len(table), len(entries), frame_bytes)


def _blocks(reader: Reader, block_bytes: int, label: str) -> Iterator[bytes]:
    """All bytes of ``reader`` in pieces of ``block_bytes``, the last one shorter."""
    while True:
        pieces = []
        missing = block_bytes
        while missing:
            try:
                piece = reader.read(missing)
            except Error:
                raise
            except OSError as error:
                raise _unreadable(error, label) from error
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        if pieces:
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if missing:
            return


class _Resumed:
    """A file of which the first bytes were read already."""

    def __init__(self, head: bytes, rest: Reader) -> None:
        self._head = head
        self._rest = rest

    def read(self, size: int, /) -> bytes:
        if not self._head:
            return self._rest.read(size)
        piece, self._head = self._head[:size], self._head[size:]
        return piece


class _Unpacked:
    """The decompressed bytes of a zstd file; damage is a `FormatError`."""

    def __init__(self, rest: Reader, label: str) -> None:
        self._zstd = zstd_module(label)
        self._file = self._zstd.ZstdFile(rest)
        self._label = label

    def read(self, size: int, /) -> bytes:
        try:
            piece: bytes = self._file.read(size)
        except (self._zstd.ZstdError, EOFError) as error:
            raise FormatError(
                f"the source is damaged or truncated zstd ({error}): get it again",
                source=self._label,
            ) from error
        return piece


def _decompressed(reader: Reader, label: str) -> Reader:
    try:
        head = b""
        while len(head) < len(ZSTD_MAGIC):
            piece = reader.read(len(ZSTD_MAGIC) - len(head))
            if not piece:
                break
            head += piece
    except Error:
        raise
    except OSError as error:
        raise _unreadable(error, label) from error
    resumed = _Resumed(head, reader)
    return _Unpacked(resumed, label) if head == ZSTD_MAGIC else resumed


def zstd_module(label: str) -> Any:
    """The standard library's zstd (3.14) or its backport.

    Raises:
        quire.SourceError: neither is installed.
    """
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise SourceError(
                "the source is compressed and no zstd module is installed to decompress it: run "
                "`pip install backports.zstd`, or `zstd -dc FILE | quire pack - -o NEW.zst`",
                source=label,
            ) from None
    return zstd


@contextmanager
def _opened(
    source: str | os.PathLike[str] | Reader,
) -> Iterator[tuple[Reader, str, int | None]]:
    """The source as a file, what to call it, and its size where that is its content's."""
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "read"):
            raise TypeError(
                f"the source must be a path or a binary file, not {type(source).__name__}"
            )
        yield source, str(getattr(source, "name", "the open file")), None
        return
    label = os.fsdecode(source)
    try:
        file = open(label, "rb")
    except OSError as error:
        raise _unreadable(error, label) from error
    with file:
        facts = os.fstat(file.fileno())
        packed = file.peek(len(ZSTD_MAGIC)).startswith(ZSTD_MAGIC)
        is_known = stat.S_ISREG(facts.st_mode) and not packed
        yield file, label, facts.st_size if is_known else None


@contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the name ``target`` once it is complete and durable.

    A temporary file in the same folder is renamed over the name; both are flushed to the disk
    (see rename(2) and fsync(2)). On any error, Ctrl-C included, the temporary file is removed.
    """
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.part")
    try:
        file = open(temporary, "xb")
        try:
            with file:
                if target.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)
    except Error:  # of what is packed, not of where it goes
        raise
    except OSError as error:
        raise Error(
            f"cannot write the destination ({error.strerror}): check the folder, its permissions "
            "and the free space",
            source=str(target),
            errno=error.errno,
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _target_path(destination: str | os.PathLike[str], source: object) -> Path:
    """The file to replace: symbolic links are followed, as when a file is opened for writing."""
    target = Path(os.path.realpath(destination))
    if target.exists() and not target.is_file():
        raise Error(
            "the destination is no regular file and cannot be replaced: name a file",
            source=str(target),
        )
    if isinstance(source, (str, os.PathLike)):
        with suppress(OSError):
            if target.samefile(source):
                raise ValueError("the destination is the source itself: name another file")
    return target


def _told(progress: Progress | None, total: int | None) -> Callable[[int], object]:
    if progress is None:
        return lambda _: None
    return lambda done: progress(done, total)


def _unreadable(error: OSError, label: str) -> SourceError:
    return SourceError(
        f"cannot read the source ({error.strerror}): check the path and its permissions",
        source=label,
        errno=error.errno,
    )

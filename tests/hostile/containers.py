"""Hostile and odd containers of the Zstandard seekable format, made byte by byte.

This is an encoder of its own: it knows RFC 8878 and the seekable format and nothing of quire, so a
misunderstanding in the reader is not repeated here. `python tests/hostile/containers.py` writes the
files that stand beside it; a test holds them to it. The first word of a file's name is what has to
happen:

- `reads`: it opens, and its bytes are `i % 251` for `i = 0, 1, ...`;
- `refused`: opening it is an error of the format;
- `fails`: it opens, and reading all of it is an error.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
SEEKABLE_MAGIC = 0x8F92EAB1
TABLE_MAGIC = 0x184D2A5E
BLOCK_BYTES = 128 << 10
FRAME_MAX = 64 << 20
MASK = (1 << 64) - 1
PRIMES = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)


def rotated(word: int, bits: int) -> int:
    """`word`, of 64 bits, rotated to the left."""
    return (word << bits | word >> (64 - bits)) & MASK


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0 (xxhash_spec.md, version 0.2.0)."""
    one, two, three, four, five = PRIMES

    def mixed(lane: int, word: int) -> int:
        return rotated((lane + word * two) & MASK, 31) * one & MASK

    at = 0
    if len(data) >= 32:
        lanes = [(one + two) & MASK, two, 0, -one & MASK]
        for at in range(0, len(data) - 31, 32):
            words = struct.unpack_from("<4Q", data, at)
            lanes = [mixed(lane, word) for lane, word in zip(lanes, words, strict=True)]
        at += 32
        total = sum(rotated(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True))
        for lane in lanes:
            total = ((total ^ mixed(0, lane)) * one + four) & MASK
    else:
        total = five
    total = (total + len(data)) & MASK
    for at_word in range(at, len(data) - 7, 8):
        word = struct.unpack_from("<Q", data, at_word)[0]
        total = (rotated(total ^ mixed(0, word), 27) * one + four) & MASK
        at = at_word + 8
    if len(data) - at >= 4:
        word = struct.unpack_from("<I", data, at)[0]
        total = (rotated(total ^ word * one & MASK, 23) * two + three) & MASK
        at += 4
    for byte in data[at:]:
        total = rotated(total ^ byte * five & MASK, 11) * one & MASK
    total = (total ^ total >> 33) * two & MASK
    total = (total ^ total >> 29) * three & MASK
    return total ^ total >> 32


def pattern(start: int, size: int) -> bytes:
    """The bytes from `start` on of what every file of `reads` holds."""
    return bytes(i % 251 for i in range(start, start + size))


def block(kind: int, size: int, content: bytes, *, last: bool = True) -> bytes:
    """A block: 0 raw, 1 one byte repeated, 2 compressed, 3 reserved."""
    return struct.pack("<I", last | kind << 1 | size << 3)[:3] + content


def raw(data: bytes) -> bytes:
    """The last block of a frame, stored."""
    return block(0, len(data), data)


def frame(blocks: bytes, size: int, *, flags: int = 0, after: bytes = b"") -> bytes:
    """A frame whose header says that it has `size` bytes and that they are its window."""
    return struct.pack("<IBI", 0xFD2FB528, 0xA0 | flags, size) + blocks + after


def windowed(blocks: bytes, window_log: int) -> bytes:
    """A frame that does not say its size, but a window."""
    return struct.pack("<IBB", 0xFD2FB528, 0, (window_log - 10) << 3) + blocks


def stored(start: int, size: int) -> bytes:
    """A frame of the pattern."""
    return frame(raw(pattern(start, size)), size)


def repeated(byte: int, blocks: int) -> bytes:
    """Blocks that make 128 KiB each out of four bytes."""
    content = bytes([byte])
    return b"".join(block(1, BLOCK_BYTES, content, last=i == blocks - 1) for i in range(blocks))


def skippable(content: bytes) -> bytes:
    """A frame that holds no data."""
    return struct.pack("<II", 0x184D2A50, len(content)) + content


Entry = tuple[int, int] | tuple[int, int, int]


def table(
    entries: Sequence[Entry],
    *,
    frames: int | None = None,
    descriptor: int | None = None,
    magic: int = TABLE_MAGIC,
    longer: int = 0,
) -> bytes:
    """A seek table; the options make it lie."""
    content = b"".join(struct.pack(f"<{len(entry)}I", *entry) for entry in entries)
    checksums = 0x80 if entries and len(entries[0]) == 3 else 0
    content += struct.pack(
        "<IBI",
        len(entries) if frames is None else frames,
        checksums if descriptor is None else descriptor,
        SEEKABLE_MAGIC,
    )
    return struct.pack("<II", magic, len(content) + longer) + content


def container(*frames: tuple[bytes, int]) -> bytes:
    """Frames, each with the size that the table says, and the table."""
    return b"".join(data for data, _ in frames) + table(
        [(len(data), size) for data, size in frames]
    )


def checked(*sizes: int, wrong: int | None = None) -> bytes:
    """Frames of the pattern and a table with checksums, that of frame `wrong` not its own."""
    at, data, entries = 0, b"", []
    for index, size in enumerate(sizes):
        checksum = xxh64(pattern(at, size)) & 0xFFFFFFFF
        packed = stored(at, size)
        entries.append((len(packed), size, checksum ^ (index == wrong)))
        data, at = data + packed, at + size
    return data + table(entries)


def readable() -> dict[str, bytes]:
    """Odd, but right."""
    data = pattern(0, 100)
    own_checksum = struct.pack("<I", xxh64(data) & 0xFFFFFFFF)
    return {
        "frames": container((stored(0, 100), 100), (stored(100, 50), 50), (stored(150, 7), 7)),
        "checksums": checked(300, 200, 31, 0, 5),
        "no-frames": table([]),
        "empty-frames": container(
            (stored(0, 0), 0),
            (stored(0, 90), 90),
            (stored(90, 0), 0),
            (stored(90, 9), 9),
            (stored(99, 0), 0),
        ),
        "skippable-frames-between": container(
            (skippable(b"first"), 0),
            (stored(0, 70), 70),
            (skippable(b"\xff" * 300), 0),
            (stored(70, 30), 30),
        ),
        "entry-without-data-that-is-no-frame": container(
            (stored(0, 60), 60), (b"garbage", 0), (stored(60, 9), 9)
        ),
        "two-frames-in-one-entry": container(
            (stored(0, 40) + stored(40, 20), 60), (stored(60, 5), 5)
        ),
        "unused-descriptor-bits": stored(0, 80)
        + table([(len(stored(0, 80)), 80)], descriptor=0b11),
        "no-content-size": container((windowed(raw(data), 17), 100)),
        "widest-window": container((windowed(raw(data), 31), 100)),
        "frame-with-its-own-checksum": container(
            (frame(raw(data), 100, flags=4, after=own_checksum), 100)
        ),
        "many-empty-blocks": container(
            (frame(block(0, 0, b"", last=False) * 500 + raw(data), 100), 100)
        ),
    }


def refused() -> dict[str, bytes]:
    """Tables that contradict themselves, the file or the limits, and files without one."""
    data = stored(0, 100)
    size = len(data)
    whole = data + table([(size, 100)])
    return {
        "empty": b"",
        "one-byte": b"\x28",
        "plain-zstd": data,
        "text": b"This is not zstd, but it is long enough to hold a footer.\n",
        "footer-alone": whole[-9:],
        "table-without-header": whole[-17:],
        "bytes-after-the-table": whole + b"\0",
        "reserved-bit-2": data + table([(size, 100)], descriptor=1 << 2),
        "reserved-bit-6": data + table([(size, 100)], descriptor=1 << 6),
        "more-frames-than-the-format": data + table([(size, 100)], frames=0xFFFFFFFF),
        "more-frames-than-the-file": data + table([(size, 100)], frames=0x07FFFFFF),
        "fewer-frames-than-the-table": data + table([(size, 100), (0, 0)], frames=1),
        "checksums-said-but-not-there": data + table([(size, 100)], descriptor=0x80),
        "checksums-there-but-not-said": data + table([(size, 100, 0)], descriptor=0),
        "other-table-magic": data + table([(size, 100)], magic=0x184D2A50),
        "table-says-longer": data + table([(size, 100)], longer=1),
        "frames-reach-into-the-table": data + table([(size + 1, 100)]),
        "frames-overlap": data + table([(size, 100), (size, 100)]),
        "bytes-before-the-table-in-no-frame": data + b"\0" + table([(size, 100)]),
        "sums-past-32-bits": data + table([(0xFFFFFFFF, 1)] * 3),
        "bytes-out-of-nothing": data + table([(size, 100), (0, 10)]),
        "frame-too-large": data + table([(size, 0xFFFFFFFF)]),
        "frame-larger-than-zstd-can-make": data + table([(size, FRAME_MAX)]),
    }


def failing() -> dict[str, bytes]:
    """Right tables over wrong frames."""
    data = pattern(0, 100)
    whole = stored(0, 100)
    half = len(whole) // 2
    bomb = repeated(7, 511)
    return {
        "bomb-of-64-mib": container((frame(bomb, 511 * BLOCK_BYTES), 1000)),
        "bomb-that-hides-its-size": container((windowed(bomb, 17), 1000)),
        "bomb-of-many-frames": container((stored(0, 10) * 200, 10)),
        "frame-shorter-than-said": container((whole, 101)),
        "frame-longer-than-said": container((whole, 99)),
        "sizes-swapped": container((stored(0, 100), 60), (stored(100, 60), 100)),
        "frame-cut-in-two": whole + table([(half, 50), (len(whole) - half, 50)]),
        "frame-without-its-end": container((whole[:-1], 100)),
        "header-says-more": container((frame(raw(data), 101), 100)),
        "header-says-less": container((frame(raw(data), 99), 100)),
        "checksum-of-the-first": checked(300, 200, wrong=0),
        "checksum-of-the-last": checked(300, 200, wrong=1),
        "own-checksum": container((frame(raw(data), 100, flags=4, after=b"\0\0\0\0"), 100)),
        "window-wider-than-zstd": container((windowed(raw(data), 41), 100)),
        "needs-a-dictionary": container(
            (struct.pack("<IBBI", 0xFD2FB528, 0xA1, 9, 100) + raw(data), 100),
        ),
        "reserved-header-bit": container((frame(raw(data), 100, flags=8), 100)),
        "reserved-block": container((frame(block(3, 100, data), 100), 100)),
        "block-longer-than-allowed": container(
            (frame(block(1, BLOCK_BYTES + 1, b"a"), 200000), 200000)
        ),
        "compressed-block-of-noise": container((frame(block(2, 100, data), 100), 100)),
        "skippable-said-to-have-data": container((skippable(b"x" * 100), 100)),
        "no-frame-at-all": container((stored(0, 10), 10), (b"\xaa" * 50, 100)),
        "old-zstd": container(
            (stored(0, 10), 10), (struct.pack("<I", 0xFD2FB527) + raw(data), 100)
        ),
        "bytes-after-the-frame": container((whole + b"\0\0\0\0", 100)),
        "second-frame-damaged": container((stored(0, 100), 100), (b"\x28\xb5\x2f\xfd\xff" * 9, 50)),
    }


def files() -> dict[str, bytes]:
    """Every file by its name."""
    kinds: dict[str, Callable[[], dict[str, bytes]]] = {
        "reads": readable,
        "refused": refused,
        "fails": failing,
    }
    return {
        f"{kind}-{name}.zst": data for kind, make in kinds.items() for name, data in make().items()
    }


if __name__ == "__main__":
    for old in FOLDER.glob("*.zst"):
        old.unlink()
    for name, data in files().items():
        (FOLDER / name).write_bytes(data)

"""Reading rows, and the rules by which outcomes are compared."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = [
    "Missing",
    "Names",
    "Op",
    "Outcome",
    "Row",
    "RowError",
    "digest",
    "page_token",
    "pattern",
    "read_rows",
    "same",
    "stored_bytes",
]

PAGE = 4096
"""The page size in which rows are written."""

Op = dict[str, Any]
Outcome = dict[str, Any]


Value = TypeVar("Value")

_POOL = "env:nr_hugepages="

_NUMBERS = {"len", "off", "old", "new", "size", "pgoff", "seed", "limit"}
_COUNTS = {"n", "page", "pages", "spare", "cur", "cur_plus"}
_WORDS = {"proc", "child", "file", "mode", "r", "w", "res", "cap", "as", "a", "b", "vec"}
_PLAIN_NUMBERS = {
    ("mlock2", "flags"),
    ("mlockall", "flags"),
    ("mseal", "flags"),
    ("remap_file_pages", "prot"),
}
"""Flags that have no names in rows."""


class Missing(Exception):  # noqa: N818 - it says what it is
    """What an operation needs and the row does not have."""


class Names(dict[str, Value]):
    """What a row has by name; what it does not have is `Missing`, and no bug of the replay."""

    def __missing__(self, name: str) -> Value:
        raise Missing(name)


class RowError(ValueError):
    """A file that does not hold rows of the format: where, and what is wrong with it."""


@dataclass(frozen=True)
class Row:
    """One sequence: its files, operations and outcomes, on one kind of file system."""

    name: str
    on_disk: bool
    files: dict[str, dict[str, int]]
    ops: list[Op]
    outcomes: list[Outcome]
    tags: tuple[str, ...] = ()
    advisory_from: int | None = None
    again: bool = False
    """A row of the file once more, on the other kind of file system."""

    @property
    def huge_pages(self) -> int:
        """The size of the pool of huge pages that it is about."""
        sizes = (tag.removeprefix(_POOL) for tag in self.tags if tag.startswith(_POOL))
        size = next(sizes, "0")
        return int(size) if size.isdecimal() else 0


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; where shmem gave other outcomes than ext4, the row comes twice.

    Raises:
        RowError: it cannot be read, or does not hold rows.
    """
    rows: list[Row] = []
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    rows += _rows(json.loads(line)) if line.strip() else []
                except ValueError as error:
                    raise RowError(f"{path}, line {number}: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise RowError(f"{path} cannot be read: {error}") from None
    if not rows:
        raise RowError(f"{path} holds no rows")
    return rows


def _rows(raw: Any) -> list[Row]:
    """The rows of a line: none if it is one of those that say something about the file."""
    if not isinstance(raw, dict):
        raise RowError("a line must hold one JSON object")
    if "ops" not in raw:
        if {"meta", "stats"} & raw.keys():
            return []
        raise RowError('an object without "ops" that is neither "meta" nor "stats"')
    name, outcomes = raw.get("id", "without id"), raw.get("out", [])
    _check(name, raw)
    for op in raw["ops"]:
        if not isinstance(op, dict) or "op" not in op:
            raise RowError(f'row {name}: {op!r} is no operation: an object with "op" is')
        for field, value in op.items():
            wanted = _kind(op["op"], field)
            if not _KINDS[wanted](value):
                raise RowError(f"row {name}: {op['op']}: {field!r} is no {wanted}: {value!r}")
    if len(outcomes) != len(raw["ops"]):
        raise RowError(f"row {name}: {len(raw['ops'])} operations, but {len(outcomes)} outcomes")
    return _both_kinds(raw)


def _kind(op: str, field: str) -> str:
    """What the field of an operation must be: a key of `_KINDS`."""
    if field in _NUMBERS or (op, field) in _PLAIN_NUMBERS:
        return "number"
    if field in _COUNTS:
        return "number of 0 or more"
    if field in _WORDS:
        return "name"
    named = {"at": "address", "to": "address", "flags": "flags", "advice": "flags"}
    others = {"prot": "protection", "fd": "descriptor", "hex": "hexadecimal text"}
    return {**named, **others, "byte": "byte", "seals": "list of names"}.get(field, "value")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and value in range(256)


def _is_address(value: Any) -> bool:
    """An offset into the arena, null, a variable's name, or an object that says where."""
    if isinstance(value, dict):
        numbers = (value.get("abs", 0), value.get("delta", 0))
        return all(isinstance(n, int) for n in numbers) and isinstance(value.get("var", ""), str)
    return value is None or isinstance(value, int | str)


def _are_flags(value: Any) -> bool:
    return all(
        isinstance(one, int | str) for one in (value if isinstance(value, list) else [value])
    )


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("([0-9a-fA-F]{2})*", value) is not None


_KINDS: dict[str, Callable[[Any], bool]] = {
    "number": lambda value: isinstance(value, int),
    "number of 0 or more": _is_count,
    "byte": _is_byte,
    "name": lambda value: isinstance(value, str),
    "address": _is_address,
    "flags": _are_flags,
    "protection": lambda value: isinstance(value, int | str),
    "descriptor": lambda value: isinstance(value, int | str),
    "hexadecimal text": _is_hex,
    "list of names": lambda value: (
        isinstance(value, list) and all(isinstance(one, str) for one in value)
    ),
    "value": lambda value: True,
}


def _is_file(name: str, file: dict[str, Any]) -> bool:
    """Whether a row's file can be made: its size, and what it is filled with."""
    return (
        "/" not in name
        and _is_count(file.get("size"))
        and _is_byte(file.get("byte", 0))
        and all(isinstance(file.get(field, 0), int) for field in ("seed", "code"))
    )


def _check(name: str, raw: dict[str, Any]) -> None:
    """Raises `RowError` for a part of a row that is not of its kind."""
    shmem, files, count = raw.get("out_shmem", {}), raw.get("files") or {}, len(raw.get("out", ()))
    advisory = raw.get("advisory_from")
    for part, is_right in (
        ("ops", isinstance(raw["ops"], list)),
        ("out", _all_objects(raw.get("out", []), list)),
        ("files", _all_objects(files, dict) and all(_is_file(*each) for each in files.items())),
        ("tags", all(isinstance(tag, str) for tag in raw.get("tags") or ())),
        ("advisory_from", advisory is None or isinstance(advisory, int)),
        ("out_shmem", _all_objects(shmem, dict) and _are_indices(shmem, count)),
    ):
        if not is_right:
            raise RowError(f"row {name}: {part!r} is not what the format says: {raw[part]!r}")


def _all_objects(value: Any, kind: type) -> bool:
    """Whether a value is a list, or an object, of objects."""
    ones = value.values() if isinstance(value, dict) else value
    return isinstance(value, kind) and all(isinstance(one, dict) for one in ones)


def _are_indices(outcomes: dict[str, Any], count: int) -> bool:
    return all(index.isdecimal() and int(index) < count for index in outcomes)


def _both_kinds(raw: dict[str, Any]) -> list[Row]:
    """The row of an object, and where it was recorded too, the same on the other file system."""
    fs = raw.get("fs", "ext4")
    row = Row(
        raw.get("id", "without id"),
        fs != "shmem",
        raw.get("files") or {},
        raw["ops"],
        raw["out"],
        tuple(raw.get("tags") or ()),
        raw.get("advisory_from"),
    )
    if fs == "shmem" or "out_shmem" not in raw:
        return [row]
    outcomes = list(row.outcomes)
    for index, outcome in raw["out_shmem"].items():
        outcomes[int(index)] = outcome
    name = f"{row.name} on shmem"
    other = Row(name, False, row.files, row.ops, outcomes, row.tags, row.advisory_from, again=True)
    return [row, other]


def pattern(seed: int, offset: int, count: int) -> bytes:
    """The bytes of a file or a store with a seed."""
    return bytes(
        (seed * 31 + i * 7 + (i >> 8) * 13 + (i >> 12) * 5) & 0xFF
        for i in range(offset, offset + count)
    )


def stored_bytes(op: Op) -> bytes:
    """What a store or a write stores."""
    if "hex" in op:
        return bytes.fromhex(op["hex"])
    if "seed" in op:
        return pattern(op["seed"], 0, op.get("n", 1))
    return bytes([op["byte"]] * op.get("n", 1))


def digest(content: bytes) -> Outcome:
    """A byte string, described shortly and exactly enough."""
    if len(content) <= 16:
        return {"hex": content.hex()}
    if content.count(content[:1]) == len(content):
        return {"fill": content[0], "n": len(content)}
    return {"sha1": hashlib.sha1(content).hexdigest()[:16], "n": len(content)}


def page_token(content: bytes) -> str:
    """A page in a snapshot: one byte if all are equal, else the start of its hash."""
    if content.count(content[:1]) == len(content):
        return f"{content[0]:02x}"
    return hashlib.sha1(content).hexdigest()[:8]


def same(wanted: Outcome, given: Outcome, *, residency: bool = True) -> bool:
    """Whether two outcomes agree. Without `residency` what mincore says is not compared."""
    if wanted == given:
        return True
    if "vmas" in wanted and "vmas" in given:
        return _merged(wanted["vmas"]) == _merged(given["vmas"])
    if "vec" in wanted and "vec" in given and len(wanted["vec"]) == len(given["vec"]):
        if not residency:
            return True
        pairs = zip(wanted["vec"], given["vec"], strict=True)
        return all(a == b or "?" in (a, b) for a, b in pairs)
    return False


def _merged(vmas: list[list[Any]]) -> list[list[Any]]:
    """Neighbours that differ in nothing that /proc shows become one."""
    merged: list[list[Any]] = []
    for start, count, permissions, offset, name in vmas:
        if merged:
            low, length, before, at, called = merged[-1]
            continues = name is None or at + length * PAGE == offset
            if low + length == start and before == permissions and called == name and continues:
                merged[-1][1] += count
                continue
        merged.append([start, count, permissions, offset, name])
    return merged

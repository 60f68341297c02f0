"""`quire info`: describes a source without mapping it."""

from __future__ import annotations

import json as json_format
import sys
from typing import Any

from quire import _core
from quire._api import find_layout
from quire.creation import RawShape
from quire.errors import FormatError
from quire.layout import ArrayLayout
from quire.npy import MAGIC, is_npy
from quire.sizes import format_size
from quire.store.resolve import Resolved, resolve
from quire.tools.parameters import Flag

__all__ = ["info"]


def info(source: str, /, *, json: Flag = False) -> None:
    """Describe SOURCE: its store, size and version, its compression, and the array in it.

    Only headers are read.

    Parameters
    ----------
    source
        A path or URL, as for quire.open.
    json
        Print one JSON object instead of a table.
    """
    resolved = resolve(source)
    try:
        facts = describe(resolved)
    finally:
        resolved.store.close()
    if json:
        sys.stdout.write(json_format.dumps(facts) + "\n")
        return
    rows = list(_rows(facts))
    width = max(len(name) for name, _ in rows)
    sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in rows)


def describe(resolved: Resolved) -> dict[str, Any]:
    """What is known of an open source, fit for JSON."""
    store, outer = resolved.store, resolved.container or resolved.store
    facts: dict[str, Any] = {
        "source": store.label,
        "store": _plain(outer.describe()),
        "store_bytes": outer.size,
        "version": store.version,
        "content_bytes": store.size,
        "zstd": None if resolved.container is None else _plain(store.describe()),
        "array": None,
    }
    if is_npy(store.read(0, min(store.size, len(MAGIC)))):
        facts["array"] = _array(store)
    return facts


def _array(store: _core.Store) -> dict[str, Any]:
    try:
        layout: ArrayLayout = find_layout(store, RawShape())
    except FormatError as error:
        return {"error": error.message}
    return {
        "format": layout.kind,
        "dtype": str(layout.dtype),
        "shape": list(layout.shape),
        "order": layout.order,
        "offset_bytes": layout.offset_bytes,
        "size_bytes": layout.size_bytes,
    }


def _plain(facts: dict[str, object]) -> dict[str, Any]:
    """Facts of a store without those of the running process."""
    return {name: value for name, value in facts.items() if name not in ("pid", "label", "size")}


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("source", facts["source"])]
    rows += [(name, str(value)) for name, value in _flat(facts["store"])]
    rows.append(("size", _size(facts["store_bytes"])))
    if facts["version"] is not None and "version" not in facts["store"]:
        rows.append(("version", facts["version"]))
    zstd = facts["zstd"]
    if zstd is not None:
        ratio = facts["content_bytes"] / max(zstd["compressed_bytes"], 1)
        rows += [
            ("compression", f"seekable zstd, {ratio:.2f} to 1"),
            ("frames", f"{zstd['frames']:,} of {format_size(zstd['frame_bytes'])}"),
            ("checksums", "yes" if zstd["checksums"] else "no"),
            ("content", _size(facts["content_bytes"])),
        ]
    array = facts["array"]
    if array is None:
        rows.append(("array", "no header: map it with dtype= and shape="))
    elif "error" in array:
        rows.append(("array", array["error"]))
    else:
        rows += [
            ("array", f"{array['dtype']} {tuple(array['shape'])}, order {array['order']}"),
            ("array bytes", f"{_size(array['size_bytes'])} from byte {array['offset_bytes']}"),
        ]
    return rows


def _flat(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value)
        elif value is not None:
            rows.append(("store" if name == "kind" else name.replace("_", " "), value))
    return rows


def _size(size_bytes: int) -> str:
    exact = f"{size_bytes:,} bytes"
    return exact if size_bytes < 1 << 10 else f"{format_size(size_bytes)} ({exact})"

"""Text for the demonstration: distinct lines of the Python sources of this installation.

The sources are those of the standard library and of the site-packages of the running
interpreter and of the one it is based on. Files are taken in an order that the seed decides, so
one installation and one seed always give the same lines.
"""

from __future__ import annotations

import os
import random
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINE_CHARS_MIN = 16
LINE_CHARS_MAX = 160


def source_roots() -> list[Path]:
    """Folders with the Python sources of this installation, none inside another, sorted."""
    names = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    names += [sysconfig.get_path(kind, vars=base) for kind in ("purelib", "platlib")]
    found = sorted({Path(name).resolve() for name in names if Path(name).is_dir()})
    return [root for root in found if not any(other in root.parents for other in found)]


def source_files(roots: list[Path]) -> list[Path]:
    """Every `.py` file below `roots`, sorted."""
    found = []
    for root in roots:
        for folder, _, names in os.walk(root):
            found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(set(found))


def distinct_lines(
    limit: int,
    seed: int,
    *,
    roots: list[Path] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[bytes]:
    """At most `limit` different lines of source text, white space collapsed, as UTF-8.

    Lines shorter than 16 or longer than 160 bytes are left out. `progress` is called with the
    number of lines found so far, after each file. Files that cannot be read are passed over.
    """
    files = source_files(source_roots() if roots is None else roots)
    random.Random(seed).shuffle(files)  # noqa: S311  (an order, not a secret)
    lines: dict[bytes, None] = {}
    for path in files:
        for line in _lines_of(path):
            lines[line] = None
        if progress is not None:
            progress(min(len(lines), limit))
        if len(lines) >= limit:
            break
    return list(lines)[:limit]


def _lines_of(path: Path) -> Iterator[bytes]:
    try:
        text = path.read_bytes()
    except OSError:
        return
    for raw in text.splitlines():
        line = b" ".join(raw.split())
        if LINE_CHARS_MIN <= len(line) <= LINE_CHARS_MAX:
            yield line

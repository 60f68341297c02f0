"""Conducts the demonstration: makes the data, starts the other processes, joins their answers."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import quire
from quire.tools.demo import check, corpus, features, report
from quire.tools.demo.settings import MIB, SLACK_BYTES, Data, DemoError, Settings
from quire.tools.demo.workload import Work
from quire.tools.range_server import RangeServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.tools.demo.progress import Bars


def run(settings: Settings, bars: Bars) -> tuple[dict[str, Any], list[report.Section]]:
    """The whole demonstration: its values (also written to `OUT/report.json`) and its tables.

    Raises `DemoError` where something is missing or the source cannot be used, and says what to do.
    """
    began = time.monotonic()
    with _data_folder(settings.out) as name:
        folder = Path(name)
        if settings.source is None:
            data = make_data(settings, folder, bars)
            with RangeServer(folder) as server:
                data.source = f"{server.url}/{data.source}"
                ours = _measure(settings, data, folder, bars)
        else:
            data = Data(settings.source)
            ours = _measure(settings, data, folder, bars)
        plain = _plain(data, ours, folder, bars)
        values = report.values_of(settings, data, ours, plain, check.compare(folder, ours, plain))
        values["picture"] = _draw(settings, ours, folder, bars)
        if settings.keep is not None:
            _keep(data, settings.keep)
    values["seconds"]["total"] = round(time.monotonic() - began, 3)
    (settings.out / "report.json").write_text(json.dumps(values, indent=1) + "\n")
    return values, report.sections(values, settings, data)


def _data_folder(out: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder for the data in `out`, where the picture and the report can be written too."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in (out / "report.json", out / "residency.png"):
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return tempfile.TemporaryDirectory(prefix="data-", dir=out)
    except OSError as error:
        raise DemoError(
            f"the demonstration cannot write to {error.filename or out} ({error.strerror}): name a "
            'folder of your own, for example --out "$(mktemp -d)"',
            errno=error.errno,
        ) from error


def make_data(settings: Settings, folder: Path, bars: Bars) -> Data:
    """Text -> matrix -> seekable zstd in `folder`, and the rows to look for."""
    rows = features.row_count(settings.size_bytes)
    _need_space(folder, 2 * settings.size_bytes)
    data = Data(
        source="features.npy.zst",
        plain=folder / "features.npy",
        packed=folder / "features.npy.zst",
        queries=folder / "queries.npy",
    )
    assert data.plain is not None
    assert data.packed is not None
    assert data.queries is not None
    with _timed(data, "text"):
        told = bars.bar("Reading lines of Python sources", rows)
        data.lines = corpus.distinct_lines(rows, settings.seed, progress=told)
        if not data.lines:
            roots = ", ".join(map(str, corpus.source_roots())) or "none found"
            raise DemoError(f"there are no Python sources in the library folders ({roots})")
        told(rows)
    with _timed(data, "features"):
        told = bars.bar("Making a matrix of them", rows)
        features.write_matrix(data.lines, rows, data.plain, progress=told)
        np.save(data.queries, features.featurise([text.encode() for text in settings.queries]))
    with _timed(data, "pack"):
        data.plain_bytes = data.plain.stat().st_size
        told = bars.bar("Packing it as seekable zstd", data.plain_bytes)
        quire.pack(data.plain, data.packed, progress=lambda done, _: told(done))
        data.packed_bytes = data.packed.stat().st_size
    return data


def _measure(settings: Settings, data: Data, folder: Path, bars: Bars) -> dict[str, Any]:
    """What the measured process says, and the work it was given."""
    work = Work(
        seed=settings.seed,
        lookup_count=settings.lookup_count,
        hot_bytes=settings.budget_bytes // 2,
        queries=str(data.queries) if data.queries else None,
        digest=data.queries is not None,
    )
    order = {
        "source": data.source,
        "budget_bytes": settings.budget_bytes,
        "pmap": settings.pmap,
        "folder": str(folder),
        "work": asdict(work),
    }
    with _timed(data, "quire"):
        result = in_process("measure", order, folder, "Using it through quire", bars)
    return result | {"work": asdict(work)}


def _plain(data: Data, ours: dict[str, Any], folder: Path, bars: Bars) -> dict[str, Any]:
    """What the process without quire says."""
    order = {
        "source": str(data.plain or data.source),
        "folder": str(folder),
        "work": ours["work"],
        "array": ours["array"],
        "in_ram": data.plain is not None,
    }
    with _timed(data, "plain numpy"):
        return in_process("plain", order, folder, "Checking with plain numpy", bars)


def _draw(settings: Settings, ours: dict[str, Any], folder: Path, bars: Bars) -> str | None:
    """The path of the picture; None, with a word on standard error, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.stderr.write("no picture: install matplotlib with `pip install 'quire[plot]'`\n")
        return None
    name = "quire demo" if settings.source is None else settings.source
    size = f"{ours['array']['bytes'] / MIB:,.0f} MiB"
    order = {
        "watch": str(folder / "watch.npz"),
        "phases": ours["outcome"]["phases"],
        "began_s": ours["began_s"],
        "array_bytes": ours["array"]["bytes"],
        "budget_bytes": settings.budget_bytes,
        "slack_bytes": SLACK_BYTES,
        "title": f"{name}: {size} of array in {settings.budget_bytes / MIB:,.0f} MiB of memory",
        "picture": str(settings.out / "residency.png"),
    }
    return str(in_process("picture", order, folder, "Drawing the picture", bars)["picture"])


def in_process(
    module: str, order: dict[str, Any], folder: Path, name: str, bars: Bars
) -> dict[str, Any]:
    """Runs `quire.tools.demo.MODULE` in a process of its own and returns its result.

    Raises `DemoError` with what the process said, or how it ended when it said nothing.
    """
    order_path, words_path = folder / f"{module}.json", folder / f"{module}.err"
    order_path.write_text(json.dumps(order))
    argv = [sys.executable, "-m", f"quire.tools.demo.{module}", str(order_path)]
    bars.update(name, 0, 1)
    with words_path.open("w") as words:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=words, text=True)
        try:
            message = _follow(process, name, bars)
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if "result" in message:
        bars.update(name, 1, 1)
        return dict(message["result"])
    if "error" in message:
        raise DemoError(message["error"])
    code = process.returncode
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    tail = words_path.read_text()[-2000:].strip()
    raise DemoError(f"the {module} process ended with {ended} and no answer. {tail}")


def _follow(process: subprocess.Popen[str], name: str, bars: Bars) -> dict[str, Any]:
    """Shows the steps of a process while it works; its last message."""
    message: dict[str, Any] = {}
    assert process.stdout is not None
    with process.stdout as said:
        for line in said:
            message = json.loads(line)
            if "step" in message:
                bars.update(f"{name}: {message['step']}", message["done"], message["total"])
    return message


def _keep(data: Data, folder: Path) -> None:
    """Moves the user's copy of the data to `folder`: the matrix, packed and plain, and its text."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (data.plain, data.packed):
        if path is not None:
            shutil.move(path, folder / path.name)
    if data.lines:
        (folder / "lines.txt").write_bytes(b"\n".join(data.lines) + b"\n")


@contextmanager
def _timed(data: Data, name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    data.seconds[name] = round(time.monotonic() - began, 3)


def _need_space(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise DemoError(
            f"{folder.parent} has {free / MIB:,.0f} MiB free and the data need about "
            f"{need_bytes / MIB:,.0f}: choose a smaller --size or another --out"
        )

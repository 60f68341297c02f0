"""`quire.compat.mmap` beside the standard library's `mmap`: the same calls on the same file.

Each contender has a mapping of its own of a file of the benchmark's real data, everything resident
and in the page tables of both. *Short* calls are timed by the thousand, at indices that are drawn
anew for each round and are the same for both; *bulk* calls one by one. A flush of one page and one
of all write what was changed just before, to the disk: here both have one file mapped, as two files
of the same bytes differ more than the calls do, by where they lie and by the folios that the page
cache keeps them in, each of which is written whole.
"""

from __future__ import annotations

import itertools
import mmap as standard
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import data
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import pretouch, rounds_of, seconds, wake_processor
from quire.compat import mmap as drop_in

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 64 << 20
BULK = 16 << 20
CALLS = 20_000
NEAR = 1 << 20  # what processors cache: the calls are measured, not the memory
ROUNDS_MIN = 25
SHORT_LIMIT, BULK_LIMIT = 1.1, 1.0
QUIRE, STANDARD = "quire.compat.mmap", "mmap"
ABSENT = b"\xfe quire \xfe is nowhere \xfe in the data"
PAGE = 4096

SHORT = {
    "m[i]": "for i in places: m[i]",
    "m[i] = byte": "for i in places: m[i] = 7",
    "m[i:i+16]": "for i in places: m[i:i+16]",
    "m[i:i+4096]": "for i in places: m[i:i+4096]",
    "m[i:i+16] = bytes": "for i in places: m[i:i+16] = sixteen",
    "find within 64 bytes": "for i in places: find(word, i, i + 64)",
    "read(100)": "seek(0)\nfor _ in places: read(100)",
    "write(100 bytes)": "seek(0)\nfor _ in places: write(hundred)",
    "readline": "seek(lines)\nfor _ in places: readline()",
    "flush of a clean page": "for _ in places[:200]: flush(0, 4096)",
}
BULKS: dict[str, Callable[[Any], Any]] = {
    "slice of 16 MiB": lambda m: m[PAGE : PAGE + BULK],
    "16 MiB set as a slice": lambda m: m.__setitem__(slice(0, BULK), FILLED),
    "read of 16 MiB": lambda m: (m.seek(PAGE), m.read(BULK)),
    "write of 16 MiB": lambda m: (m.seek(0), m.write(FILLED)),
    "find in 64 MiB": lambda m: m.find(ABSENT, 0),
    "rfind in 64 MiB": lambda m: m.rfind(ABSENT, 0),
    "find of a byte in 16 MiB": lambda m: m.find(b"\xfb", SIZE - BULK),
    "move of 16 MiB": lambda m: m.move(0, BULK, BULK),
}
FILLED = bytes(range(256)) * (BULK // 256)


def run(context: Context) -> Topic:
    """Times every call of both, after their results were compared."""
    topic = Topic("mmap and its drop-in")
    pretouch(2 * SIZE)
    wake_processor()
    rounds = max(ROUNDS_MIN, context.rounds)
    content = data.plain_path(Path(context.data)).read_bytes()[: SIZE - BULK]
    lines = b"".join(b"line %d of the benchmark\n" % number for number in range(BULK // 32))
    content = (content + lines + bytes(SIZE))[:SIZE].replace(b"\xfb", b"\xfa")
    with tempfile.TemporaryDirectory(dir=context.data) as folder:
        made = {name: _mapped(folder, name, content) for name in (QUIRE, STANDARD)}
        _compare(made, topic)
        for what, code in SHORT.items():
            calls = _short(made, code, content, context.seed)
            _measure(topic, context, what, calls, rounds, "ns", 1e9, SHORT_LIMIT)
        for what, call in BULKS.items():
            calls = {name: _once(call, m) for name, m in made.items()}
            _measure(topic, context, what, calls, rounds, "ms", 1e3, BULK_LIMIT)
        for m in made.values():
            m.close()
        both = Path(folder, "both")
        both.write_bytes(content)
        made = {name: _opened(both, name) for name in made}
        for what, size in (("flush of a changed page", PAGE), ("flush of 16 MiB changed", BULK)):
            calls = {name: _flush(m, size) for name, m in made.items()}
            _measure(topic, context, what, calls, rounds, "µs", 1e6, SHORT_LIMIT)
        for m in made.values():
            m.close()
    return topic


def _mapped(folder: str, name: str, content: bytes) -> Any:
    path = Path(folder, name)
    path.write_bytes(content)
    return _opened(path, name)


def _opened(path: Path, name: str) -> Any:
    with open(path, "r+b") as file:
        m = (drop_in if name == QUIRE else standard).mmap(file.fileno(), 0)
    for at in range(0, SIZE, PAGE):
        m[at] = m[at]  # in the page tables, open to writes
    m.flush()
    return m


def _compare(made: dict[str, Any], topic: Topic) -> None:
    """Every kind of call on both, the results and what the files hold afterwards."""
    ours, theirs = made[QUIRE], made[STANDARD]
    for what, call in BULKS.items():
        require(_result(call(ours)) == _result(call(theirs)), what)
    places = random.Random(1).sample(range(SIZE - PAGE), 1000)
    for at in places:
        same = ours[at] == theirs[at] and ours[at : at + 99] == theirs[at : at + 99]
        require(same, "m[i] and slices")
        require(ours.find(b"\x00\x3f", at) == theirs.find(b"\x00\x3f", at), "find")
    for m in made.values():
        m.seek(SIZE - BULK)
    require([ours.readline() for _ in places] == [theirs.readline() for _ in places], "readline")
    require(ours[:] == theirs[:], "all")
    topic.checks.append(
        "results of all calls, and the bytes of both files, were equal before timing"
    )


def _result(found: Any) -> Any:
    """Without what `seek` returns, which is the position since Python 3.13."""
    return found[1:] if isinstance(found, tuple) else found


def _short(
    made: dict[str, Any], code: str, content: bytes, seed: int
) -> dict[str, Callable[[], float]]:
    order = {name: itertools.count(seed) for name in made}
    program = compile(code, "short", "exec")

    def timed(name: str) -> float:
        m = made[name]
        drawn = random.Random(next(order[name]))
        places = [drawn.randrange(NEAR) for _ in range(CALLS)]
        names = {
            "m": m, "places": places, "find": m.find, "read": m.read, "write": m.write,
            "seek": m.seek, "readline": m.readline, "flush": m.flush, "lines": SIZE - BULK,
            "sixteen": bytes(16), "hundred": bytes(100), "word": content[-40:],
        }  # fmt: skip
        count = 200 if "[:200]" in code else CALLS
        return seconds(lambda: exec(program, names)) / count

    return {name: lambda name=name: timed(name) for name in made}


def _once(call: Callable[[Any], Any], m: Any) -> Callable[[], float]:
    return lambda: seconds(lambda: call(m))


def _flush(m: Any, size: int) -> Callable[[], float]:
    turn = itertools.count()

    def timed() -> float:
        byte = next(turn) % 256
        for at in range(0, size, PAGE):
            m[at] = byte
        return seconds(lambda: m.flush(0, size))

    return timed


def _measure(
    topic: Topic,
    context: Context,
    what: str,
    calls: dict[str, Callable[[], float]],
    rounds: int,
    unit: str,
    scale: float,
    limit: float,
) -> None:
    times = rounds_of(calls, rounds, context.seed)
    topic.add(times, unit, scale, what)
    beside = ratio(times, QUIRE, STANDARD)
    topic.want(f"{what}: time beside mmap", beside, limit, at_least=False)


if __name__ == "__main__":
    topic_main(run)

"""The pager process driven over its protocol, as the native core drives it."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import user_stores
from core_side import Answer, CoreSide
from user_stores import SIZE_BYTES, pattern

from quire import errors
from quire.pager import encode_recipe
from quire.store import object_store

if TYPE_CHECKING:
    from quire.tools.range_server import RangeServer

IO, TRUNCATED, CORRUPT, CHECKSUM, TIMEOUT = 1, 2, 4, 5, 7


def refused(answer: object) -> Answer:
    assert isinstance(answer, Answer)
    assert answer.code
    return answer


def test_hello() -> None:
    with CoreSide(user_stores.PatternStore()) as core:
        assert core.opened
        facts = {"size": SIZE_BYTES, "label": "pattern", "version": "v1", "kind": "PatternStore"}
        assert facts.items() <= core.first.items()


def test_many_requests_in_flight() -> None:
    generator = random.Random(3)
    with CoreSide(user_stores.PatternStore(), slots=16, slot_bytes=65536) as core:
        asked = {}
        for slot in range(16):
            asked[slot] = (generator.randrange(SIZE_BYTES - 65536), generator.randrange(1, 65536))
            core.ask(slot, *asked[slot])
        for _ in range(500):
            answer = core.answer()
            assert answer is not None
            assert answer.code == 0
            offset, length = asked[answer.slot]
            assert core.slot(answer.slot, length) == pattern(offset, length)
            asked[answer.slot] = (generator.randrange(SIZE_BYTES - 65536), length)
            core.ask(answer.slot, *asked[answer.slot])


def test_a_slow_read_does_not_hold_up_others(tmp_path: Path) -> None:
    with CoreSide(user_stores.WaitingStore()) as core:
        core.ask(0, 0, 100)
        core.ask(1, 4096, 100)
        first, second = core.answer(), core.answer()
        assert first is not None
        assert second is not None
        assert {first.slot, second.slot} == {0, 1}
        assert core.slot(0, 100) == pattern(0, 100)


@pytest.mark.parametrize(
    ("index", "code", "number", "words"),
    [
        (0, IO, 0, "the store raised ValueError: first"),
        (1, IO, errno.EIO, "Input/output error"),
        (2, IO, errno.ETIMEDOUT, "the store raised TimeoutError"),
        (3, IO, errno.ENOMEM, "MemoryError"),
        (4, IO, 0, "KeyboardInterrupt"),
        (5, IO, 0, "SystemExit"),
        (6, CHECKSUM, 0, "sum is wrong"),
        (7, CORRUPT, 0, "does not decode"),
        (8, TIMEOUT, 0, "took too long"),
        (9, IO, 0, "xxxx"),
        (10, IO, 0, "StopIteration"),
    ],
)
def test_exceptions_become_replies(index: int, code: int, number: int, words: str) -> None:
    with CoreSide(user_stores.RaisingStore()) as core:
        answer = refused(core.read((index + 1) * 4096, 100))
        assert (answer.code, answer.errno) == (code, number)
        assert words in answer.message
        assert len(answer.message.encode()) <= 512
        assert core.read(1 << 20, 100) == pattern(1 << 20, 100), "the pager lives on"


def test_a_short_read_is_refused() -> None:
    with CoreSide(user_stores.ShortStore()) as core:
        answer = refused(core.read(0, 100))
        assert answer.code == TRUNCATED
        assert "50 of 100 bytes" in answer.message


def test_a_store_that_keeps_its_buffers() -> None:
    with CoreSide(user_stores.KeepingStore()) as core:
        for offset in range(0, 10_000, 1000):
            assert core.read(offset, 100) == pattern(offset, 100)


def test_requests_outside_the_memory_are_refused() -> None:
    with CoreSide(user_stores.PatternStore(), slots=2, slot_bytes=4096) as core:
        core.ask(2, 0, 10)
        assert refused(core.answer()).code == IO
        core.ask(1, 0, 4097)
        assert refused(core.answer()).code == IO
        assert core.read(0, 4096) == pattern(0, 4096)


def test_end_of_control_closes_the_store_and_ends(tmp_path: Path) -> None:
    core = CoreSide(user_stores.PatternStore(tmp_path))
    assert core.read(0, 10) == pattern(0, 10)
    assert core.close() == 0
    assert (tmp_path / "closed").exists()


def test_a_stuck_store_does_not_keep_the_process(tmp_path: Path) -> None:
    core = CoreSide(user_stores.StuckStore(tmp_path))
    core.ask(0, 0, 10)
    while not (tmp_path / "waiting").exists():
        assert core.process.poll() is None
    assert core.close() == 0


def test_terminal_signals_are_for_the_parent() -> None:
    with CoreSide(user_stores.PatternStore()) as core:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):
            core.process.send_signal(number)
            assert core.read(0, 10) == pattern(0, 10)


def test_a_killed_process_is_seen() -> None:
    with CoreSide(user_stores.PatternStore()) as core:
        assert core.read(0, 10) == pattern(0, 10)
        core.process.kill()
        assert core.answer() is None


def test_a_process_killed_with_requests_in_flight_is_seen(tmp_path: Path) -> None:
    with CoreSide(user_stores.StuckStore(tmp_path)) as core:
        for slot in range(8):
            core.ask(slot, 0, 10)
        core.process.kill()
        assert core.answer() is None


def test_a_store_that_ends_its_process_is_seen() -> None:
    with CoreSide(user_stores.DyingStore()) as core:
        assert core.read(0, 10) == pattern(0, 10)
        assert core.read(4096, 10) is None


def test_standard_output_is_the_parents() -> None:
    script = (
        f"import sys; sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})\n"
        "from core_side import CoreSide; import user_stores\n"
        "with CoreSide(user_stores.PrintingStore()) as core:\n"
        "    assert core.read(0, 10) == user_stores.pattern(0, 10)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    assert "a store's words" in ended.stderr


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("source", {"code": "source", "errno": 2, "message": "there is no such thing: look"}),
        ("format", {"code": "format", "errno": None, "message": "not of that format"}),
        ("other", {"code": "source", "errno": None, "message": "ZeroDivisionError: by zero"}),
        ("exit", {"code": "source", "errno": None, "message": "SystemExit"}),
    ],
)
def test_failures_to_open(kind: str, facts: dict[str, object]) -> None:
    with CoreSide(user_stores.Unopenable(kind)) as core:
        assert not core.opened
        assert core.first["code"] == facts["code"]
        assert core.first["errno"] == facts["errno"]
        assert str(facts["message"]) in core.first["message"]
        assert core.process.wait(60) == 1


def test_a_size_that_is_none() -> None:
    with CoreSide(user_stores.BadSizeStore()) as core:
        assert "the size of a store must be an int" in core.first["message"]


def test_a_class_that_is_not_there_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "passing_module.py").write_text("class Passing:\n    label = 'passing'\n")
    monkeypatch.syspath_prepend(tmp_path)
    import passing_module  # type: ignore[import-not-found]

    recipe = encode_recipe(passing_module.Passing())
    (tmp_path / "passing_module.py").unlink()
    with CoreSide(recipe) as core:
        assert "cannot import the store's class" in core.first["message"]


def test_garbage_for_a_recipe() -> None:
    with CoreSide(b"not a pickle") as core:
        assert not core.opened


def test_what_cannot_be_pickled_is_refused_in_the_parent() -> None:
    with pytest.raises(errors.SourceError, match=r"cannot be sent.*lock"):
        encode_recipe(user_stores.Unpicklable())


def test_a_class_of_main_needs_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(user_stores.PatternStore):
        pass

    with CoreSide(Local()) as core:
        assert core.read(8, 8) == pattern(8, 8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.SourceError, match="pip install cloudpickle"):
        encode_recipe(Local())


def test_http_through_the_process(server: RangeServer, content: bytes) -> None:
    with CoreSide(object_store.recipe(f"{server.url}/x.bin")) as core:
        assert core.first["size"] == len(content)
        assert core.first["kind"] == "http"
        for slot in range(16):
            core.ask(slot, slot * 10_000, 9_999)
        for _ in range(16):
            answer = core.answer()
            assert answer is not None
            start = answer.slot * 10_000
            assert core.slot(answer.slot, 9_999) == content[start : start + 9_999]


def test_http_refusals_through_the_process(server: RangeServer) -> None:
    with CoreSide(object_store.recipe(f"{server.url}/nothing")) as core:
        assert core.first["errno"] == errno.ENOENT
        assert "404" in core.first["message"]


def test_changed_object_through_the_process(server: RangeServer, folder: Path) -> None:
    with CoreSide(object_store.recipe(f"{server.url}/x.bin")) as core:
        assert isinstance(core.read(0, 10), bytes)
        (folder / "x.bin").write_bytes(b"another")
        assert refused(core.read(0, 10)).code == 3


def test_the_process_leaks_no_descriptor_to_its_children() -> None:
    """A store may start processes; they must not hold the control socket open."""
    with CoreSide(user_stores.PatternStore()) as core:
        fds = Path(f"/proc/{core.process.pid}/fdinfo")
        sockets = [
            path.name
            for path in Path(f"/proc/{core.process.pid}/fd").iterdir()
            if str(path.readlink()).startswith(("socket:", "/memfd:"))
        ]
        assert sockets
        for name in sockets:
            flags = int((fds / name).read_text().split("flags:")[1].split()[0], 8)
            assert flags & os.O_CLOEXEC


def test_hello_is_json_for_any_details() -> None:
    from quire.pager.server import hello

    class Odd(user_stores.PatternStore):
        @property
        def details(self) -> dict[str, object]:
            return {"when": Path("x")}

    assert json.loads(hello(Odd())[1:])["details"] == {"when": "x"}


def test_parcel_holds_the_import_path() -> None:
    parcel = pickle.loads(encode_recipe(user_stores.PatternStore()))
    assert parcel.import_path == tuple(sys.path)

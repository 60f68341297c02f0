"""`quire.compat.patch` and `python -m quire.compat`: unchanged programs on the drop-ins."""

from __future__ import annotations

import mmap
import os
import py_compile
import signal
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire.compat.memmap
import quire.compat.mmap
import quire.compat.shared_memory
from quire.compat import patch

MODULE = sys.modules[patch.__module__]  # whose name in the package is the function's
HANG_S = 60
ORIGINALS = {
    "mmap": mmap.mmap,
    "memmap": np.memmap,
    "load": np.load,
    "open_memmap": np.lib.format.open_memmap,
    "SharedMemory": shared_memory.SharedMemory,
    "ShareableList": shared_memory.ShareableList,
}
REPLACEMENTS = {
    "mmap": quire.compat.mmap.mmap,
    "memmap": quire.compat.memmap.memmap,
    "load": quire.compat.memmap.load,
    "open_memmap": quire.compat.memmap.open_memmap,
    "SharedMemory": quire.compat.shared_memory.SharedMemory,
    "ShareableList": quire.compat.shared_memory.ShareableList,
}

PROGRAM = """
import sys
import multiprocessing
import numpy as np
from mmap import mmap, ACCESS_READ
from multiprocessing import shared_memory


def child(queue):
    queue.put((mmap.__module__, np.memmap.__module__, shared_memory.SharedMemory.__module__))


if __name__ == "__main__":
    with open(__file__, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as m:
        assert m.find(b"import sys") == 1
    x = np.lib.format.open_memmap("x.npy", "w+", "f8", (3,))
    x[:] = 1, 2, 3
    x.flush()
    loaded = np.load("x.npy", mmap_mode="r")
    print(type(m).__module__, type(loaded).__module__, loaded.sum(), sys.argv, __name__)
    for how in sys.argv[1:]:
        context = multiprocessing.get_context(how)
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        print(how, *queue.get())
        process.join()
    sys.exit(5)
"""


def current() -> dict[str, object]:
    """What the public names are bound to."""
    return {
        "mmap": mmap.mmap,
        "memmap": np.memmap,
        "load": np.load,
        "open_memmap": np.lib.format.open_memmap,
        "SharedMemory": shared_memory.SharedMemory,
        "ShareableList": shared_memory.ShareableList,
    }


@pytest.fixture
def other() -> Iterator[types.ModuleType]:
    """A loaded module that has imported the names."""
    made = types.ModuleType("a_program_of_mine")
    exec(
        "from mmap import mmap, ACCESS_READ\nfrom numpy import load as read\nimport numpy\n"
        "held = [mmap]",
        made.__dict__,
    )
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


def test_names_are_replaced_and_put_back(other: types.ModuleType) -> None:
    assert current() == ORIGINALS
    with patch():
        assert current() == REPLACEMENTS
        assert other.mmap is quire.compat.mmap.mmap
        assert other.read is quire.compat.memmap.load
        assert other.held == [ORIGINALS["mmap"]]
        assert other.ACCESS_READ == 1
    assert current() == ORIGINALS
    assert (other.mmap, other.read) == (ORIGINALS["mmap"], ORIGINALS["load"])


def test_replacements_of_quire_itself_stay() -> None:
    with patch():
        pass
    assert quire.compat.mmap.mmap is REPLACEMENTS["mmap"]
    assert quire.compat.memmap.load is REPLACEMENTS["load"]


def test_nested_and_after_an_exception() -> None:
    def fail() -> None:
        with patch():
            with patch():
                assert current() == REPLACEMENTS
            assert current() == REPLACEMENTS
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert current() == ORIGINALS


def test_blocks_of_two_threads_overlap() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with patch():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with patch():
        thread.start()
        inside.wait()
    assert current() == REPLACEMENTS
    leave.set()
    thread.join()
    assert current() == ORIGINALS


def exit_code_of_a_fork(work: Callable[[], bool]) -> int:
    """0 where it is so in a child of a fork."""
    child = os.fork()
    if child == 0:
        signal.alarm(HANG_S)
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fork_while_another_thread_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread is in the middle of it: a fork waits, so that the child has all names, or none."""
    inside, forking, forked = threading.Event(), threading.Event(), threading.Event()
    replace = MODULE._replace

    def slow(*arguments: Any) -> None:
        inside.set()
        forking.wait()
        replace(*arguments)

    def patched_in_child() -> bool:
        with patch():
            return current() == REPLACEMENTS

    def other() -> None:
        with patch():
            forked.wait()

    os.register_at_fork(before=forking.set)  # which is called before that of `patch`
    monkeypatch.setattr(MODULE, "_replace", slow)
    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    code = exit_code_of_a_fork(patched_in_child)
    forked.set()
    thread.join()
    assert code == 0
    assert current() == ORIGINALS


def test_blocks_in_a_forked_child() -> None:
    """Its own end; those of threads that it does not have do not."""

    def as_before() -> bool:
        with patch():
            inside = current()
        return (inside, current()) == (REPLACEMENTS, ORIGINALS)

    def as_it_was() -> bool:
        with patch():
            pass
        return current() == REPLACEMENTS

    assert exit_code_of_a_fork(as_before) == 0
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with patch():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    code = exit_code_of_a_fork(as_it_was)
    leave.set()
    thread.join()
    assert code == 0
    assert current() == ORIGINALS


def test_what_the_program_binds_meanwhile_stays(other: types.ModuleType) -> None:
    with patch():
        other.mmap = "my own"
        del other.read
    assert other.mmap == "my own"
    assert not hasattr(other, "read")


def test_a_failure_to_patch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(quire.compat.shared_memory, "ShareableList")
    with pytest.raises(AttributeError, match="ShareableList"), patch():
        pass
    monkeypatch.undo()
    assert current() == ORIGINALS
    with patch():
        assert current() == REPLACEMENTS
    assert current() == ORIGINALS


@patch()
def decorated() -> dict[str, object]:
    return current()


def test_as_a_decorator() -> None:
    assert decorated() == REPLACEMENTS
    assert current() == ORIGINALS


def test_what_is_made_inside_goes_on(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(5))
    with patch():
        m = mmap.mmap(-1, 5)
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
    m[0] = 9
    assert m[0] == 9
    assert x.sum() == 10


@pytest.mark.parametrize("imported", ["before", "inside"])
@pytest.mark.parametrize("makes", [True, False])
def test_joblib_knows_maps_of_both_kinds(tmp_path: Path, imported: str, makes: bool) -> None:
    """It looks for the class that it has imported, at the end of an array's bases."""
    before = np.memmap(tmp_path / "before.bin", "i4", "w+", shape=9)
    inside = None
    with pytest.MonkeyPatch.context() as names:
        reducer = types.ModuleType("joblib._memmapping_reducer")
        names.setitem(sys.modules, reducer.__name__, reducer)
        vars(reducer)["mmap"] = mmap.mmap
        for _ in range(2):
            with patch():
                if imported == "inside":
                    vars(reducer)["mmap"] = mmap.mmap
                if makes:
                    inside = np.memmap(tmp_path / "inside.bin", "i4", "w+", shape=9)
                if makes or imported == "before":
                    assert is_mapped(before, reducer.mmap)
            for array in (before, np.memmap(tmp_path / "after.bin", "i4", "w+", shape=9)):
                assert is_mapped(array, reducer.mmap)
            assert inside is None or is_mapped(inside, reducer.mmap)


def is_mapped(array: Any, kinds: Any) -> bool:
    base = getattr(array, "base", None)
    return base is not None and (isinstance(base, kinds) or is_mapped(base, kinds))


def test_the_standard_library_uses_it() -> None:
    """`multiprocessing.Array` lies in memory that `mmap` has mapped."""
    code = (
        "from quire.compat import patch\n"
        "with patch():\n"
        "    import multiprocessing.heap\n"
        "    values = multiprocessing.Array('d', 1000)\n"
        "    values[:] = range(1000)\n"
        "    arena = multiprocessing.heap.BufferWrapper._heap._arenas[0]\n"
        "    assert type(arena.buffer).__module__ == 'quire.compat.mmap', arena.buffer\n"
        "    assert sum(values) == 499500\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=100)
    assert done.returncode == 0


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "quire.compat", *arguments]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=100)


CHILDREN = "quire.compat.mmap quire.compat.memmap quire.compat.shared_memory"


def test_a_script_runs_patched_with_its_children(program: Path) -> None:
    ways = ["fork", "spawn", "forkserver"]
    done = run(program.parent, "program.py", *ways)
    assert done.returncode == 5, done.stderr
    first, *rest = done.stdout.splitlines()
    said = f"quire.compat.mmap quire.compat.memmap 6.0 ['program.py', {str(ways)[1:]} __main__"
    assert first == said
    assert rest == [f"{how} {CHILDREN}" for how in ways]


def test_a_module_runs_patched(program: Path) -> None:
    done = run(program.parent, "-m", "program", "spawn")
    assert done.returncode == 5, done.stderr
    assert done.stdout.splitlines()[1] == f"spawn {CHILDREN}"


SAYS_WHAT_IT_IS = """
import atexit, os, pickle, sys, threading


class Here:
    pass


def say(when):
    print(when, type(pickle.loads(pickle.dumps(Here()))) is Here, "annotations" in globals())


def after_the_end():
    threading.main_thread().join()
    say("in a thread")


names = "__name__", "__file__", "__package__", "__spec__", "__cached__", "__doc__"
shown = [str(globals()[name]).partition(" object at ")[0] for name in names]
print(shown, sys.argv, sys.path[0], sys._getframe().f_code.co_filename)
os.chdir("/")
say("in the body")
atexit.register(say, "at exit")
threading.Thread(target=after_the_end).start()
"""
PROGRAMS = {
    "a script": ("says.py",),
    "a script in a folder": ("package/says.py",),
    "a script by a path": ("./package/../says.py",),
    "a module": ("-m", "package.says"),
    "a package": ("-m", "package"),
    "a folder": ("package",),
    "a zip file": ("says.zip",),
    "compiled": ("says.pyc",),
    "standard input": ("-",),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_is_what_it_is_without(tmp_path: Path, program: tuple[str, ...]) -> None:
    """To its end: threads and what `atexit` calls find its `__main__` still."""
    package = tmp_path / "package"
    package.mkdir()
    for name in ("says.py", "package/says.py", "package/__main__.py", "package/__init__.py"):
        (tmp_path / name).write_text("" if "init" in name else SAYS_WHAT_IT_IS)
    with zipfile.ZipFile(tmp_path / "says.zip", "w") as archive:
        archive.write(package / "__main__.py", "__main__.py")
    py_compile.compile(str(tmp_path / "says.py"), str(tmp_path / "says.pyc"))
    plain, ours = (
        subprocess.run(
            [sys.executable, *patched, *program, "argument"],
            cwd=tmp_path,
            input=SAYS_WHAT_IT_IS,
            capture_output=True,
            text=True,
            timeout=100,
        )
        for patched in ((), ("-m", "quire.compat"))
    )
    assert plain.stdout.count("True") == 3
    assert (ours.stdout, ours.stderr, ours.returncode) == (plain.stdout, "", 0)


def test_a_module_that_is_absent(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "absent")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No module named absent" in done.stderr


def test_an_exception_of_the_program_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import mmap\n1 / 0\n")
    done = run(tmp_path, "fails.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert 'fails.py", line 2' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage: "),
        (("-x",), "usage: "),
        (("-m",), "usage: "),
        (("absent.py",), "no file 'absent"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m quire.compat")

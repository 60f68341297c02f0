"""`python -m quire.testing.replay`: its report, its exit codes, its rules of comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quire.model import GEOMETRIES, AddressSpace
from quire.testing.replay import kernel_world, native
from quire.testing.replay import replay as replay_module
from quire.testing.replay.__main__ import main
from quire.testing.replay.random_rows import random_row
from quire.testing.replay.replay import Setting, outcomes, replay
from quire.testing.replay.rows import Row, digest, page_token, same
from quire.testing.replay.scale import Scale

CASES = Path(__file__).parent / "cases"
FEW = CASES / "few.jsonl"
MMAP = {"op": "mmap", "at": 0, "len": 4096, "prot": "rw", "flags": ["PRIVATE", "ANON", "FIXED"]}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_report(capsys):
    assert main([str(FEW), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"rows": 5, "ops": 41, "mismatches": [], "skipped": {}}


def test_options(capsys):
    options = ["--frames", "4", "--tlb", "off", "--geometry", "aarch64-64k", "--checked"]
    assert main([str(FEW), *options]) == 0
    assert "5 rows, 41 operations" in capsys.readouterr().out


def test_mismatch_is_reported_and_ends_its_row(tmp_path, capsys):
    store = {"op": "store", "at": 0, "n": 1, "byte": 5}
    load = {"op": "load", "at": 0, "n": 1}
    wrong = {
        "id": "wrong",
        "ops": [MMAP, store, load, load],
        "out": [{"ok": {"at": 0}}, {"ok": 1}, {"hex": "06"}, {"hex": "07"}],
    }
    assert main([write_rows(tmp_path / "rows.jsonl", wrong), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [m["index"] for m in report["mismatches"]] == [2]
    assert report["mismatches"][0]["given"] == {"hex": "05"}
    assert report["ops"] == 3
    assert main([write_rows(tmp_path / "rows.jsonl", wrong)]) == 1
    assert "mismatch" in capsys.readouterr().out


def test_skips_have_reasons(tmp_path, capsys):
    tagged = {"id": "x86", "ops": [MMAP], "out": [{"ok": {"at": 0}}], "tags": ["arch:x86-64"]}
    later = {"id": "late", "ops": [MMAP, MMAP], "out": [{"ok": {"at": 0}}, {}], "advisory_from": 1}
    path = write_rows(tmp_path / "rows.jsonl", {"meta": {}}, tagged, later)
    assert main([path, "--json", "--geometry", "aarch64-16k"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["skipped"] == {"arch:x86-64": 1, "operations after advisory_from": 1}
    assert (report["rows"], report["ops"]) == (1, 1)


@pytest.mark.parametrize("on", ["model", "kernel"])
@pytest.mark.parametrize(
    ("tag", "where"),
    [
        ("env:nr_hugepages=99999", ("kernel",)),
        ("env:nr_hugepages=none", ("model", "kernel")),
        ("env:overcommit=9", ("model", "kernel")),
        ("env:pku=unknown", ("model", "kernel")),
        ("env:unheard=of", ("model", "kernel")),
        ("version>=99.1", ("model", "kernel")),
        ("version>=4.5", ()),
        ("arch:x86-64", ()),
        ("arch:sparc", ("model", "kernel")),
        ("slow", ()),
        ("limit:max_map_count", ()),
    ],
)
def test_rows_of_other_systems_are_skipped(on, tag, where):
    row = Row("tagged", True, {}, [MMAP], [{"ok": {"at": 0}}], tags=("strict", tag))
    total = replay([row], Setting(on=on))
    assert total.skipped == ({tag: 1} if on in where else {})
    assert total.mismatches == []


def test_privileged_rows_are_roots_alone(monkeypatch):
    row = Row("tagged", True, {}, [MMAP], [{"ok": {"at": 0}}], tags=("privileged",))
    monkeypatch.setattr(replay_module.os, "geteuid", lambda: 1000)
    assert replay([row], Setting(on="kernel")).skipped == {"privileged": 1}
    assert replay([row], Setting()).skipped == {}


def row_of(files=None, **op):
    return json.dumps({"id": "r", "files": files or {}, "ops": [op] if op else [], "out": [{}]})


WRONG_FILES = {
    "not json": ("{", "line 1: Expecting"),
    "no object": ("[1]", "must hold one JSON object"),
    "no row": ('{"id": "r"}', 'object without "ops"'),
    "other format": ('{"id": "r", "ops": ["load x"]}', "row r: 'load x' is no operation"),
    "no outcomes": (json.dumps({"id": "r", "ops": [MMAP]}), "1 operations, but 0 outcomes"),
    "empty": ("", "holds no rows"),
    "meta alone": ('{"meta": {}}', "holds no rows"),
    "operations no list": ('{"id": "r", "ops": 5, "out": []}', "row r: 'ops' is not"),
    "outcome no object": (json.dumps({"id": "r", "ops": [MMAP], "out": [3]}), "'out' is not"),
    "file no object": ('{"ops": [], "out": [], "files": {"f": 3}}', "'files' is not"),
    "advisory": ('{"ops": [], "out": [], "advisory_from": "x"}', "'advisory_from' is not"),
    "tags": ('{"ops": [], "out": [], "tags": [7]}', "'tags' is not"),
    "shmem": ('{"ops": [], "out": [], "out_shmem": {"7": {}}}', "'out_shmem' is not"),
    "length": (
        '{"ops": [{"op": "load", "n": "x"}], "out": [{}]}',
        "load: 'n' is no number of 0 or more: 'x'",
    ),
    "negative": (row_of(op="load", at=0, n=-5), "load: 'n' is no number of 0 or more: -5"),
    "address": (row_of(op="load", at=[0], n=1), "load: 'at' is no address: [0]"),
    "address of words": (row_of(op="load", at={"abs": "x"}, n=1), "'at' is no address"),
    "byte": (row_of(op="store", at=0, n=1, byte=256), "store: 'byte' is no byte: 256"),
    "hexadecimal": (row_of(op="store", at=0, hex="0g"), "'hex' is no hexadecimal text: '0g'"),
    "flags": (row_of(op="mmap", at=0, flags={}), "mmap: 'flags' is no flags: {}"),
    "flags by name": (row_of(op="mlock2", at=0, len=1, flags="x"), "'flags' is no number: 'x'"),
    "name": (row_of(op="fork", child=3), "fork: 'child' is no name: 3"),
    "seals": (row_of(op="seal", fd="f", seals="GROW"), "'seals' is no list of names: 'GROW'"),
    "size of words": (row_of(files={"f": {"size": "x"}}), "'files' is not"),
    "no size": (row_of(files={"f": {"seed": 1}}), "'files' is not"),
    "path": (row_of(files={"../f": {"size": 1}}), "'files' is not"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_without_rows(name, tmp_path, capsys):
    text, message = WRONG_FILES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert main([str(path), "--json"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert str(path) in told.err
    assert message in told.err


def test_files_that_cannot_be_read(tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl")]) == 2
    whole = (CASES / "cases.jsonl.gz").read_bytes()
    cut, raw = tmp_path / "cut.jsonl.gz", tmp_path / "raw.jsonl"
    cut.write_bytes(whole[:200])
    raw.write_bytes(whole)
    assert main([str(cut)]) == 2
    assert main([str(raw)]) == 2
    assert capsys.readouterr().err.count("cannot be read") == 3


WRONG_OPERATIONS = {
    "there is no operation 'fly'": {"op": "fly"},
    "there is no operation 'address'": {"op": "address"},
    "load: no 'at'": {"op": "load"},
    "store: no 'byte'": {"op": "store", "at": 0},
    "load: no 'var'": {"op": "load", "at": {}},
    "open: no 'append-only'": {"op": "open", "file": "f", "fd": "f", "mode": "append-only"},
    "mprotect: no 'q'": {"op": "mprotect", "at": 0, "len": 1, "prot": "q"},
    "load: no 'v'": {"op": "load", "at": {"var": "v"}},
    "madvise: no 'NOPE'": {"op": "madvise", "at": 0, "len": 1, "advice": "NOPE"},
    "fsize: no 'f'": {"op": "fsize", "fd": "f"},
    "maps: no 'p7'": {"op": "maps", "proc": "p7"},
    "setrlimit: no 'NOPE'": {"op": "setrlimit", "res": "NOPE", "cur": 1},
    "setrlimit: no 'STACK'": {"op": "setrlimit", "res": "STACK", "cur_plus": 1},
}


@pytest.mark.parametrize("on", ["model", "kernel"])
def test_operations_that_are_not_of_the_format(on):
    """They are mismatches that say why; the rows beside them are replayed."""
    rows = [Row(said, True, {}, [op], [{"ok": 0}]) for said, op in WRONG_OPERATIONS.items()]
    total = replay(rows, Setting(on=on))
    assert [m["row"] for m in total.mismatches] == list(WRONG_OPERATIONS)
    for mismatch in total.mismatches:
        assert mismatch["row"] in mismatch["given"]["harness"]


@pytest.mark.parametrize("on", ["model", "kernel"])
def test_a_process_that_has_ended_does_nothing_more(on):
    ops = [{"op": "fork", "child": "c"}, {"op": "exit", "proc": "c"}, {**MMAP, "proc": "c"}]
    row = Row("ended", True, {}, ops, [{"ok": 0}] * 3)
    (mismatch,) = replay([row], Setting(on=on)).mismatches
    assert mismatch["index"] == 2
    assert "mmap: no 'c'" in mismatch["given"]["harness"]


@pytest.mark.parametrize(
    "option", ["--frames=0", "--frames=x", "--tlb=-1", "--tlb=x", "--geometry=x", "--on=x"]
)
def test_wrong_options(option, capsys):
    with pytest.raises(SystemExit) as left:
        main([str(FEW), option])
    assert left.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--frames=4", "--tlb=off", "--geometry=aarch64-4k", "--checked"]
)
def test_the_kernel_has_no_options_of_the_model(option, capsys):
    with pytest.raises(SystemExit) as left:
        main([str(FEW), "--on=kernel", option])
    assert left.value.code == 2
    assert "not --on kernel" in capsys.readouterr().err


def test_a_bug_of_the_model_is_not_blamed_on_the_row(monkeypatch):
    monkeypatch.setattr(AddressSpace, "munmap", lambda *_: {}["bug"])
    row = Row("fine", True, {}, [{"op": "munmap", "at": 0, "len": 1}], [{"ok": 0}])
    with pytest.raises(KeyError, match="bug"):
        replay([row], Setting())


def test_the_model_is_replayed_without_the_core_numpy_or_pytest():
    """Where the kernel's side cannot even be imported."""
    absent = ("quire._core", "numpy", "pytest", "resource", "fcntl")
    program = f"""if True:
        import runpy, sys
        sys.modules.update(dict.fromkeys({absent}))
        sys.argv = ["replay", "--on", "model", {str(FEW)!r}, "--json"]
        runpy.run_module("quire.testing.replay", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mismatches"] == []


def test_outcomes_compare():
    assert not same({"ok": 0}, {"err": "EINVAL"})
    assert same({"vec": "1?"}, {"vec": "10"})
    assert not same({"vec": "11"}, {"vec": "10"})
    assert same({"vec": "11"}, {"vec": "10"}, residency=False)
    split = {"vmas": [[0, 1, "rw-p", 0, None], [1, 1, "rw-p", 0, None]]}
    assert same(split, {"vmas": [[0, 2, "rw-p", 0, None]]})
    named = {"vmas": [[0, 1, "r--s", 0, "f"], [1, 1, "r--s", 8192, "f"]]}
    assert not same(named, {"vmas": [[0, 2, "r--s", 0, "f"]]})


def test_descriptions_of_data():
    assert digest(b"ab") == {"hex": "6162"}
    assert digest(b"a" * 20) == {"fill": 97, "n": 20}
    assert digest(b"a" * 20 + b"b")["n"] == 21
    assert page_token(bytes(4096)) == "00"
    assert len(page_token(bytes(4095) + b"x")) == 8


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_scale(name):
    geometry = GEOMETRIES[name]
    scale = Scale(geometry)
    assert scale.up(4096) == geometry.page_size
    assert scale.up((1 << 47) - 4096) == geometry.user_top
    assert scale.up(1 << 45) == 1 << 45
    assert scale.shrink(scale.stretch(b"abc")) == b"abc"
    assert scale.down(geometry.page_size) == 4096
    assert scale.up((1 << 44) - 4096) == (1 << 44) - geometry.page_size
    assert scale.down((1 << 44) - geometry.page_size) == (1 << 44) - 4096


def test_random_rows_repeat_with_their_seed():
    assert random_row(7) == random_row(7)
    assert random_row(7).ops != random_row(8).ops
    assert len(list(outcomes(random_row(7), Setting()))) == len(random_row(7).ops)


def test_the_kernel_asks_for_a_compiler_and_for_linux(monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="install `cc`"):
        native._compiled()
    monkeypatch.setattr(kernel_world.platform, "machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match="x86-64 alone"):
        kernel_world.KernelWorld(random_row(1))

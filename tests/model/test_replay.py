"""`python -m quire.testing.replay`: its report, its exit codes, its rules of comparison."""

import json
from pathlib import Path

import pytest

from quire.model import GEOMETRIES
from quire.testing.replay import kernel_world, native
from quire.testing.replay.__main__ import main
from quire.testing.replay.random_rows import random_row
from quire.testing.replay.replay import Setting, outcomes
from quire.testing.replay.rows import digest, page_token, same
from quire.testing.replay.scale import Scale

FEW = Path(__file__).parent / "cases" / "few.jsonl"
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

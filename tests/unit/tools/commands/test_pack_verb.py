import io
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest

import quire
from quire.tools.cli import main


def test_packs_beside_the_file(rows, rows_file, capsys):
    assert main(["pack", str(rows_file)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{rows_file}.zst" in err
    assert "256.0 KiB" in err
    with quire.open(f"{rows_file}.zst") as mapping:
        assert np.array_equal(mapping.array, rows)


def test_options(rows_file, tmp_path, capsys):
    target = tmp_path / "x.zst"
    options = ["--frame", "64KiB", "--level", "-1", "--threads", "2", "--no-checksum", "--json"]
    assert main(["pack", str(rows_file), "-o", str(target), *options]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert err == ""
    assert facts["file"] == str(target)
    assert facts["frame_bytes"] == 64 << 10
    assert facts["packed_bytes"] == target.stat().st_size
    assert main(["info", "--json", str(target)]) == 0
    assert json.loads(capsys.readouterr().out)["zstd"]["checksums"] is False


def test_quiet(rows_file, capsys):
    assert main(["pack", str(rows_file), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_standard_input(tmp_path, monkeypatch):
    data = np.arange(1000, dtype="u1").tobytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["pack", "-", "-o", str(tmp_path / "x.zst")]) == 0
    with quire.open(tmp_path / "x.zst", dtype="u1") as mapping:
        assert mapping.array.tobytes() == data


def test_empty_file_has_no_ratio_of_zero(tmp_path, capsys):
    (tmp_path / "empty").touch()
    assert main(["pack", str(tmp_path / "empty")]) == 0
    assert "0 bytes in 0 frames" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["absent"], ["here", "-o", "absent/x.zst"]])
def test_errors_are_messages(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_bytes(b"x")
    assert main(["pack", *arguments]) == 1
    assert "absent" in capsys.readouterr().err


def test_terminal_sees_a_bar_and_no_data(rows_file):
    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "quire.tools.cli", "pack", str(rows_file)]
    with subprocess.Popen(command, stderr=secondary, stdout=subprocess.PIPE) as process:
        os.close(secondary)
        assert process.stdout.read() == b""
    shown = os.read(primary, 1 << 16)
    os.close(primary)
    assert process.returncode == 0
    assert b"Packing" in shown

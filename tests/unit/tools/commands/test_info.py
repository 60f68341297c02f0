import json

import numpy as np
import pytest

import quire
from quire.tools.cli import main


def described(capsys, *arguments) -> dict:
    assert main(["info", "--json", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_npy(rows, rows_file, capsys):
    facts = described(capsys, rows_file)
    assert facts["source"] == str(rows_file)
    assert facts["store"]["kind"] == "file"
    assert facts["store_bytes"] == facts["content_bytes"] == rows_file.stat().st_size
    assert facts["version"]
    assert facts["zstd"] is None
    assert facts["array"] == {
        "format": "npy",
        "dtype": "float64",
        "shape": [512, 512],
        "order": "C",
        "offset_bytes": 128,
        "size_bytes": rows.nbytes,
    }


def test_packed_npy(rows_file, tmp_path, capsys):
    result = quire.pack(rows_file, tmp_path / "x.zst", frame="64 KiB")
    facts = described(capsys, tmp_path / "x.zst")
    assert facts["store_bytes"] == result.packed_bytes
    assert facts["content_bytes"] == result.source_bytes
    assert facts["zstd"]["frames"] == result.frames
    assert facts["zstd"]["frame_bytes"] == 64 << 10
    assert facts["array"]["dtype"] == "float64"


def test_raw_and_damaged(tmp_path, capsys):
    (tmp_path / "raw").write_bytes(bytes(10))
    assert described(capsys, tmp_path / "raw")["array"] is None
    np.save(tmp_path / "object.npy", np.array([None]), allow_pickle=True)
    assert "Python objects" in described(capsys, tmp_path / "object.npy")["array"]["error"]


@pytest.mark.parametrize("packed", [False, True])
def test_table(packed, rows_file, tmp_path, capsys):
    path = rows_file
    if packed:
        path = tmp_path / "x.zst"
        quire.pack(rows_file, path)
    assert main(["info", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert str(path) in out
    assert "float64 (512, 512), order C" in out
    assert ("seekable zstd" in out) is packed


def test_table_of_raw_bytes(tmp_path, capsys):
    (tmp_path / "raw").write_bytes(bytes(10))
    assert main(["info", str(tmp_path / "raw")]) == 0
    assert "map it with dtype=" in capsys.readouterr().out


def test_plain_zstd_is_refused_with_the_remedy(tmp_path, capsys):
    (tmp_path / "x.zst").write_bytes(quire._core.compress_frame(b"x", 3)[0])
    assert main(["info", str(tmp_path / "x.zst")]) == 1
    assert "quire pack" in capsys.readouterr().err

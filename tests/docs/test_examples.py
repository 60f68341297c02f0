"""Runs every script of `examples/` as a user would, and the ten lines of the README."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import quire

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout


def test_there_are_examples() -> None:
    small = {"compressed_array", "errors", "own_store", "ring_buffer", "shards", "web_array"}
    large = {"file_server", "frame_ring", "key_value_store", "read_or_map"}
    assert small | large <= {script.stem for script in EXAMPLES}


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matrix = np.random.default_rng(1).random((50_000, 100), dtype=np.float32)
    np.save("features.npy", matrix)
    quire.pack("features.npy", "features.npy.zst")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, object] = {"q": matrix[7]}
    exec(compile(code[1], "README.md", "exec"), names)
    assert np.array_equal(np.asarray(names["x"]), matrix)
    assert Path("copy.bin").read_bytes() == matrix.tobytes()

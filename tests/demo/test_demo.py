"""`quire demo` as a user runs it: what it promises at a small size, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
BUDGET_BYTES = 8 * MIB
PROMISED = {
    "correct",
    "array_bytes",
    "budget_bytes",
    "peak_resident_bytes",
    "peak_rss_growth_bytes",
    "bytes_fetched",
    "faults",
    "fault_us_p50",
    "fault_us_p99",
}


def quire_demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the command; nothing of it is a terminal."""
    argv = [sys.executable, "-m", "quire.tools.cli", "demo", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run at a small size: its values and its folder."""
    out = tmp_path_factory.mktemp("demo")
    done = quire_demo("--json", "--size", "48 MiB", "--budget", "8 MiB", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout), out


def test_it_promises_and_keeps(ran: tuple[dict[str, Any], Path]) -> None:
    values, _ = ran
    assert set(values) >= PROMISED
    assert values["correct"] is True
    assert values["array_bytes"] >= 48 * MIB
    assert values["budget_bytes"] == BUDGET_BYTES
    assert 0 < values["peak_resident_bytes"] <= BUDGET_BYTES
    assert values["peak_rss_growth_bytes"] <= BUDGET_BYTES + 32 * MIB
    assert values["bytes_fetched"] > values["packed_bytes"]
    assert 0 < values["fault_us_p50"] <= values["fault_us_p99"]
    assert values["faults"] > 0


def test_it_leaves_the_picture_and_the_report_and_no_data(
    ran: tuple[dict[str, Any], Path],
) -> None:
    values, out = ran
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "residency.png"]
    assert (out / "residency.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text()) == values


def test_a_search_finds_the_line_itself(tmp_path: Path) -> None:
    done = quire_demo("--size", "2 MiB", "--budget", "4 MiB", "--out", tmp_path, "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert "Every answer is right." in done.stdout
    assert "Nearest lines" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("pmap", ["uffd", "inline", "mprotect"])
def test_a_users_own_array(tmp_path: Path, pmap: str) -> None:
    array = np.random.default_rng(1).integers(0, 1000, (4000, 300)).astype("i4")
    np.save(tmp_path / "own.npy", array)
    out = tmp_path / "out"
    done = quire_demo(
        "--json",
        "--source",
        tmp_path / "own.npy",
        "--budget",
        "2 MiB",
        "--pmap",
        pmap,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["correct"] is True
    assert values["pmap"] == pmap
    assert values["array_shape"] == [4000, 300]
    assert "plain reading" in values["checked_against"]


def test_data_are_kept_when_asked_for(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    done = quire_demo("--json", "--size", "2 MiB", "--keep", keep, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in keep.iterdir())
    assert names == ["features.npy", "features.npy.zst", "lines.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "/nowhere/x.npy"], "/nowhere/x.npy"),
        (["--source", "http://127.0.0.1:9/x.npy"], "http://127.0.0.1:9/x.npy"),
        (["--size", "1 KiB"], "shows nothing"),
        (["--budget", "64 bananas"], "bananas"),
        (["--size", "900000 GiB"], "--size"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    done = quire_demo(*arguments, "--out", tmp_path / "out")
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_array_without_numbers_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "words.npy", np.array(["some", "words"]))
    done = quire_demo("--source", tmp_path / "words.npy", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "not numbers" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_refused_is_refused_before_data_are_made(tmp_path: Path) -> None:
    for pmap in ("soft", "magic"):
        done = quire_demo("--pmap", pmap, "--out", tmp_path / "out")
        assert done.returncode == 1
        assert pmap in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["/proc/out", "/dev/null/out", "/dev/null"])
def test_a_folder_that_cannot_be_written(out: str) -> None:
    done = quire_demo("--out", out)
    assert done.returncode == 1
    assert "--out" in done.stderr
    assert out in done.stderr
    assert "Traceback" not in done.stderr

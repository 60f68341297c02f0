"""The examples of `docs/migration/memmap.md` and `shared_memory.md`, run as a reader would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = Path(__file__).resolve().parents[2] / "docs/migration"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["memmap", "shared_memory"])
def test_a_page_runs(name: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall((PAGES / f"{name}.md").read_text())
    assert len(blocks) >= 3
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")

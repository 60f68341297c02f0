import subprocess
import sys

import pytest

import quire


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    words = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return set(words.split())


def test_import_loads_nothing_heavy():
    heavy = {"numpy", "email", "obstore", "fsspec", "rich", "cyclopts", "matplotlib", "quire._core"}
    assert not heavy & modules_after("import quire, quire.errors")


def test_opening_a_file_loads_only_numpy(rows_file):
    loaded = modules_after(f"import quire; quire.open({str(rows_file)!r}).close()")
    assert "numpy" in loaded
    assert not {"obstore", "fsspec", "rich", "cyclopts", "ssl", "email", "socket"} & loaded


@pytest.mark.parametrize("name", [*quire.__all__, "__version__"])
def test_every_public_name_is_there(name):
    assert getattr(quire, name) is not None
    assert name == "__version__" or name in dir(quire)


def test_importing_modules_hides_no_function():
    code = "import quire.packing, quire.stats, quire._api; import quire; quire.pack.__call__"
    assert modules_after(code)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'mmap'"):
        _ = quire.mmap

import os
import subprocess
import sys

import numpy as np

import quire
from quire._fork import watch_interpreter


def test_hooks_are_registered_once(monkeypatch, rows_file):
    quire.open(rows_file, budget="1 MiB").close()
    calls = []
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: calls.append(hooks))
    watch_interpreter()
    assert calls == []


def test_forked_child_has_the_data_or_a_clear_error(rows, rows_file):
    """Never zeros: the child leaves with 0 for equal data, 3 for a `quire.Error`."""
    with quire.open(rows_file, budget="1 MiB", granule=4096) as mapping:
        array = mapping.array
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = 0 if np.array_equal(array, rows) else 2
            except quire.Error:
                status = 3
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 3)
        assert np.array_equal(array, rows)
        del array


def test_interpreter_ends_quietly_with_open_mappings(rows_file):
    code = f"""
import quire, threading
mapping = quire.open({str(rows_file)!r}, budget="1 MiB", granule=4096)
view = mapping.array
threading.Thread(target=view.sum, daemon=True).start()
import atexit; atexit.register(view.sum)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")

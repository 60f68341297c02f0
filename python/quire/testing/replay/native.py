"""The C helper that touches memory and survives:

compiled with `cc` at first use, called by ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["Fault", "helper"]

_SOURCE = Path(__file__).with_name("touch.c")


class Fault(ctypes.Structure):
    """What the signal handler saw."""

    _fields_ = (
        ("signal", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("address", ctypes.c_uint64),
        ("done", ctypes.c_uint64),
    )


@functools.cache
def helper() -> ctypes.CDLL:
    """The helper's functions.

    Raises:
        RuntimeError: there is no C compiler.
    """
    library = _compiled()
    report = ctypes.POINTER(Fault)
    word, pointer = ctypes.c_uint64, ctypes.c_void_p
    library.touch_load.argtypes = [word, word, pointer, report]
    library.touch_store.argtypes = [word, word, pointer, report]
    library.touch_call.argtypes = [word, report]
    library.touch_syscall.argtypes = [ctypes.c_long] * 7
    library.touch_syscall.restype = ctypes.c_long
    return library


def _compiled() -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("replaying rows on the kernel needs a C compiler: install `cc`")
    source = _SOURCE.read_bytes()
    name = f"quire-touch-{os.getuid()}-{hashlib.sha256(source).hexdigest()[:16]}.so"
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory) / name
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", built, _SOURCE], check=True)
        return ctypes.CDLL(str(built))

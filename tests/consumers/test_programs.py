"""Unchanged programs that map files through libraries, plain and by `python -m quire.compat`.

Each says on standard output what it found, which must be the same, and on standard error of which
module its maps were.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = {
    "numpy": """
        import numpy as np
        np.save("x.npy", np.arange(100_000.0).reshape(1000, 100))
        x = np.load("x.npy", mmap_mode="r+")
        x[7] = -1
        x.flush()
        y = np.memmap("raw.bin", "i4", "w+", shape=(1000,))
        y[::3] = 5
        del y
        print(np.load("x.npy").sum(), np.fromfile("raw.bin", "i4").sum(), x[5:9].mean(axis=1))
        said(x)
    """,
    "joblib": """
        import joblib, numpy as np
        from joblib import Parallel, delayed

        def total(rows, start):
            return float(rows[start : start + 250].sum())

        if __name__ == "__main__":
            joblib.dump(np.arange(100_000.0).reshape(1000, 100), "x.joblib")
            x = joblib.load("x.joblib", mmap_mode="r")
            np.save("x.npy", np.asarray(x))
            y = np.load("x.npy", mmap_mode="r")
            starts = range(0, 1000, 250)
            for kind in ("loky", "threading"):
                print(Parallel(2, backend=kind)(delayed(total)(y, at) for at in starts))
            out = np.memmap("out.bin", "f8", "w+", shape=(1000, 100))
            print(Parallel(2, max_nbytes=0)(delayed(total)(x, at) for at in starts))
            said(y)
    """,
    "scikit-learn": """
        import numpy as np
        from sklearn.decomposition import PCA
        from sklearn.ensemble import RandomForestRegressor
        from sklearn.linear_model import Ridge

        if __name__ == "__main__":
            made = np.random.default_rng(0).standard_normal((2000, 12))
            np.save("x.npy", made)
            x = np.load("x.npy", mmap_mode="r")
            print(Ridge().fit(x[:, 1:], x[:, 0]).coef_.round(9))
            print(PCA(3).fit(x).explained_variance_.round(9))
            forest = RandomForestRegressor(8, n_jobs=2, random_state=0, max_depth=4)
            print(forest.fit(x[:, 1:], x[:, 0]).predict(x[:5, 1:]).round(9))
            said(x)
    """,
    "pyarrow": """
        import mmap, pyarrow as pa
        table = pa.table({"a": list(range(5000)), "b": [str(n) for n in range(5000)]})
        with pa.OSFile("t.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        with open("t.arrow", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
        print(found.equals(table), found["a"].to_pylist()[-3:], found.nbytes)
        said(mapped)
    """,
    "pandas": """
        import mmap, pandas as pd
        with open("t.csv", "w") as file:
            file.write("a,b\\n" + "".join(f"{n},{n * n}\\n" for n in range(3000)))
        print(pd.read_csv("t.csv", memory_map=True).sum().to_dict())
        said(mmap.mmap(-1, 1))
    """,
    "scipy": """
        import numpy as np
        from scipy.io import netcdf_file, wavfile
        with netcdf_file("t.nc", "w") as file:
            file.createDimension("n", 1000)
            file.createVariable("v", "f4", ("n",))[:] = np.arange(1000)
        with netcdf_file("t.nc", "r", mmap=True) as file:
            print(float(file.variables["v"][:].copy().sum()))
        wavfile.write("t.wav", 8000, np.arange(4000, dtype="i2"))
        rate, x = wavfile.read("t.wav", mmap=True)
        print(rate, int(x.sum()))
        said(x)
    """,
    "fsspec": """
        import mmap, fsspec
        with open("t.bin", "wb") as file:
            file.write(bytes(range(256)) * 4000)
        cache = fsspec.caching.MMapCache(
            1 << 16, lambda a, b: (bytes(range(256)) * 4000)[a:b], 1_024_000, location="cached.bin"
        )
        print(cache._fetch(1000, 1010), cache._fetch(900_000, 900_005))
        said(cache.cache)
    """,
    "safetensors": """
        import numpy as np
        from safetensors import safe_open
        from safetensors.numpy import load, load_file, save_file
        import mmap
        save_file({"w": np.arange(9000.0).reshape(90, 100)}, "t.safetensors")
        print(load_file("t.safetensors")["w"].sum())
        with safe_open("t.safetensors", "np") as file:
            print(file.get_slice("w")[3:5].sum())
        with open("t.safetensors", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        print(load(mapped[:])["w"][7, :3])
        said(mapped)
    """,
}

SAID = """
import sys

def said(mapped):
    print(type(mapped).__module__, file=sys.stderr)
"""


STORES = """
import joblib, numpy as np
from quire.compat import patch

def store(rows, at):
    rows[at] = at

def stored(rows):
    rows[:] = 0
    joblib.Parallel(2)(joblib.delayed(store)(rows, at) for at in range(1, 4))
    return rows[:, 0].tolist() == [0, 1, 2, 3]

if __name__ == "__main__":
    before = np.memmap("before.bin", "f8", "w+", shape=(4, 10))
    with patch():
        inside = np.memmap("inside.bin", "f8", "w+", shape=(4, 10))
        print(stored(inside))
    after = np.memmap("after.bin", "f8", "w+", shape=(4, 10))
    print(type(after).__module__, stored(before), stored(inside), stored(after))
"""


def test_no_store_of_joblib_is_lost_around_a_patch(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(STORES)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "True\nnumpy True True True\n", done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_runs_the_same(name: str, tmp_path: Path) -> None:
    lines = PROGRAMS[name].splitlines()
    program = SAID + "\n".join(line.removeprefix(" " * 8) for line in lines) + "\n"
    outcomes = []
    for how in ((), ("-m", "quire.compat")):
        folder = tmp_path / f"folder{len(how)}"
        folder.mkdir()
        (folder / "program.py").write_text(program)
        outcomes.append(
            subprocess.run(
                [sys.executable, *how, "program.py"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=100,
            )
        )
    plain, patched = outcomes
    assert plain.returncode == 0, plain.stderr
    assert patched.returncode == 0, patched.stderr
    assert patched.stdout == plain.stdout != ""
    assert plain.stderr.split() in (["mmap"], ["numpy"])
    assert patched.stderr.strip() in ("quire.compat.mmap", "quire.compat.memmap")

"""`python -m bench`: every topic in a process of its own, then the table of targets.

Tables go to standard output, progress to standard error, every figure to `bench/out/bench.json`.
The exit code is 0 when everything ran and was equal, whether or not each target was met.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import data
from bench.result import (
    Context,
    Topic,
    figure_table,
    record,
    target_table,
    topic_from,
    write_json,
)

TOPICS = (
    "hot_rows",
    "kernel",
    "kernel_budget",
    "zstd_rows",
    "remote_rows",
    "paging",
    "writes",
    "swap",
    "shared",
    "compat_mmap",
    "compat_arrays",
    "exports",
    "import_time",
    "model",
)
PACKAGES = ("quire", "numpy", "zarr", "numcodecs", "tensorstore", "obstore", "fsspec")
OUT = Path(__file__).parent / "out"
README = Path(__file__).with_name("README.md")
MIB = 1 << 20


def main() -> int:
    """Runs what was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("topics", nargs="*", help=f"of {', '.join(TOPICS)}; none: all")
    parser.add_argument("--size", type=int, default=256, help="MiB of data, default 256")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each figure, default 5")
    parser.add_argument("--seed", type=int, default=20261120, help="decides rows and orders")
    parser.add_argument(
        "--record", action="store_true", help="also put the tables into bench/README.md"
    )
    options = parser.parse_args()
    if unknown := set(options.topics) - set(TOPICS):
        parser.error(f"no topic {', '.join(sorted(unknown))}: choose of {', '.join(TOPICS)}")
    OUT.mkdir(exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="data-", dir=OUT) as folder:
        print(f"making {options.size} MiB of data", file=sys.stderr, flush=True)
        made = data.make(Path(folder), options.size * MIB, options.seed)
        about = machine() | {"seed": options.seed, "rounds": options.rounds, "data": made}
        print(about_text(about), flush=True)
        context = Context(folder, str(OUT), options.rounds, options.seed)
        topics = [run_topic(name, context) for name in options.topics or TOPICS]
    print("\n## Targets\n")
    print(target_table(topics))
    about["seconds"] = round(time.monotonic() - began, 1)
    write_json(OUT / "bench.json", topics, about)
    if options.record:
        record(README, about_text(about), topics)
    print(f"\nevery figure: {OUT / 'bench.json'} ({about['seconds']:.0f} s)", file=sys.stderr)
    return 0


def run_topic(name: str, context: Context) -> Topic:
    """Runs one topic as a process and prints its table."""
    print(f"running {name}", file=sys.stderr, flush=True)
    argv = [sys.executable, "-m", f"bench.{name}", json.dumps(asdict(context))]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    topic = topic_from(json.loads(done.stdout))
    print(f"\n## {topic.name}\n")
    print(figure_table(topic) + "\n")
    for line in topic.checks + topic.notes:
        print(f"- {line}")
    sys.stdout.flush()
    return topic


def machine() -> dict[str, Any]:
    """What the figures are measured on and with."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    return {
        "processor": model,
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def about_text(about: dict[str, Any]) -> str:
    """The machine, versions, data and seed in words."""
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    sizes = about["data"]["file_bytes"].items()
    files = ", ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in sizes)
    return (
        f"machine: {about['processor']}, {about['cpus']} CPUs, {about['memory_mib']:,} MiB, "
        f"{about['kernel']}, Python {about['python']}\n"
        f"versions: {packages}\n"
        f"data: {about['data']['rows']:,} rows of 4 KiB from {about['data']['lines']:,} lines; "
        f"{files}\n"
        f"seed: {about['seed']}, rounds: {about['rounds']}, load before: {about['load']:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())

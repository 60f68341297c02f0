"""Servers for the tests of remote sources: a range server, a misbehaving one, and S3 by moto."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from misbehaving_server import Misbehaving

from quire.store import object_store
from quire.tools.range_server import RangeServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quire.store.abc import Store

QUICK = {"retry_config": {"max_retries": 2, "backoff": {"init_backoff": 0.001}}}
FILE_BYTES = 300_001
S3_START_TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no cloud account of whoever runs the tests."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def open_url() -> Iterator[Callable[..., Store]]:
    """Opens a URL in this process; the keywords are its storage options. Closed afterwards."""
    opened: list[Store] = []

    def open_one(url: str, **options: object) -> Store:
        opened.append(object_store.recipe(url, {**QUICK, **options}).open())
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def content() -> bytes:
    """The bytes of the served file."""
    return random.Random(20).randbytes(FILE_BYTES)


@pytest.fixture
def folder(tmp_path: Path, content: bytes) -> Path:
    """The served directory, with the file ``x.bin`` in it."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "x.bin").write_bytes(content)
    return served


@pytest.fixture
def server(folder: Path) -> Iterator[RangeServer]:
    """The range server as shipped."""
    with RangeServer(folder) as running:
        yield running


@pytest.fixture
def bad_server(folder: Path) -> Iterator[Misbehaving]:
    """A server that misbehaves on demand."""
    with Misbehaving(folder) as running:
        yield running


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A moto server; authentication is not checked until a test asks for it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "1000000000"},
    )
    assert process.stderr is not None
    watchdog = threading.Timer(S3_START_TIMEOUT_S, process.kill)
    watchdog.start()
    found = None
    for line in process.stderr:
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if found:
            break
    watchdog.cancel()
    assert found, "the moto server did not start"
    drain = threading.Thread(target=process.stderr.read, daemon=True)
    drain.start()
    yield found.group(0)
    process.terminate()
    process.wait()
    drain.join()
    process.stderr.close()


@pytest.fixture
def bucket(s3_endpoint: str) -> Iterator[Any]:
    """A boto3 bucket of the moto server, emptied and deleted afterwards."""
    import boto3

    s3 = boto3.resource(
        "s3",
        endpoint_url=s3_endpoint,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    made = s3.create_bucket(Bucket="quire-test")
    yield made
    made.objects.all().delete()
    made.delete()

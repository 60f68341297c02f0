"""S3, Google and Azure clients against one misbehaving server: what unsigned reads meet.

All three ask for ``/BUCKET/KEY`` of their endpoint, so the range server can stand in for each.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
from reading import OpenUrl, read

from quire import errors
from quire.store import object_store
from quire.store.cloud_options import CloudOptions

if TYPE_CHECKING:
    from pathlib import Path

    from misbehaving_server import Misbehaving

    from quire.store.abc import Store

FAMILIES: dict[str, dict[str, Any]] = {
    "s3": {"anon": True},
    "s3a": {"skip_signature": True, "region": "eu-west-1"},
    "gs": {"token": "anon"},
    "gcs": {"anon": True},
    "az": {"anon": True, "account_name": "someone"},
    "abfs": {"skip_signature": True, "account_name": "someone"},
}


@pytest.fixture(params=FAMILIES)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def options(scheme: str, bad_server: Misbehaving, folder: Path) -> dict[str, Any]:
    """Storage options for the server, in which x.bin has become BUCKET/data/x.bin."""
    (folder / "bucket" / "data").mkdir(parents=True)
    (folder / "x.bin").rename(folder / "bucket" / "data" / "x.bin")
    return {**FAMILIES[scheme], "endpoint_url": bad_server.url}


@pytest.fixture
def store(open_url: OpenUrl, scheme: str, options: dict[str, Any]) -> Store:
    return open_url(f"{scheme}://bucket/data/x.bin", **options)


def test_reads_and_sends_the_pin(
    store: Store, scheme: str, bad_server: Misbehaving, content: bytes
) -> None:
    assert store.size == len(content)
    assert store.label == f"{scheme}://bucket/data/x.bin"
    assert read(store, 1000, 5000) == content[1000:6000]
    request = bad_server.requests()[-1]
    assert request["headers"]["if-match"] == store.version
    assert request["headers"]["range"] == "bytes=1000-5999"
    assert "authorization" not in request["headers"]


def test_no_ranges(
    open_url: OpenUrl, scheme: str, options: dict[str, Any], bad_server: Misbehaving
) -> None:
    bad_server.behave("ignore_range")
    with pytest.raises(errors.SourceError, match=r"no range requests.*download"):
        open_url(f"{scheme}://bucket/data/x.bin", **options)


def test_nothing_there(open_url: OpenUrl, scheme: str, options: dict[str, Any]) -> None:
    with pytest.raises(errors.SourceError, match="check the spelling") as caught:
        open_url(f"{scheme}://bucket/nothing", **options)
    assert caught.value.errno == errno.ENOENT


def test_passing_failures_are_retried(
    store: Store, bad_server: Misbehaving, content: bytes
) -> None:
    bad_server.behave("status", status=503, count=2)
    assert read(store, 0, 1000) == content[:1000]
    bad_server.behave(sending="drop", sendings=2)
    assert read(store, 0, 1000) == content[:1000]


def test_lasting_failures(store: Store, bad_server: Misbehaving) -> None:
    bad_server.behave("status", status=500)
    with pytest.raises(errors.PageIOError, match="500") as caught:
        read(store, 4096, 10)
    assert caught.value.errno == errno.EIO
    assert caught.value.offset == 4096


def test_refused(store: Store, bad_server: Misbehaving) -> None:
    bad_server.behave("status", status=403)
    with pytest.raises(errors.PageIOError, match="403") as caught:
        read(store, 0, 10)
    assert caught.value.errno == errno.EACCES


def test_short_bodies(store: Store, bad_server: Misbehaving) -> None:
    bad_server.behave(sending="truncate", bytes=500)
    with pytest.raises(errors.TruncatedError, match="ended early"):
        read(store, 0, 100_000)


def test_gone(store: Store, bad_server: Misbehaving) -> None:
    bad_server.stop()
    with pytest.raises(errors.PageIOError) as caught:
        read(store, 0, 10)
    assert caught.value.errno == errno.ECONNREFUSED


@pytest.mark.parametrize("scheme", ["s3"], indirect=True)
def test_stalled(
    open_url: OpenUrl, scheme: str, options: dict[str, Any], bad_server: Misbehaving
) -> None:
    store = open_url(
        f"{scheme}://bucket/data/x.bin",
        timeout=1,
        **{**options, "retry_config": {"max_retries": 0}},
    )
    bad_server.behave(sending="stall")
    with pytest.raises(errors.PageIOError, match="did not answer in time") as caught:
        read(store, 0, 10)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_condition_that_is_ignored(store: Store, bad_server: Misbehaving) -> None:
    bad_server.behave("etag", value='"another"')
    with pytest.raises(errors.ChangedError, match="its ETag was"):
        read(store, 0, 10)


def test_overwritten(store: Store, folder: Path) -> None:
    (folder / "bucket" / "data" / "x.bin").write_bytes(b"another")
    with pytest.raises(errors.ChangedError, match="changed while it was mapped"):
        read(store, 0, 10)


def test_ranges_that_cease(store: Store, bad_server: Misbehaving) -> None:
    bad_server.behave("ignore_range")
    with pytest.raises(errors.PageIOError, match="no range requests"):
        read(store, 0, 10)


@pytest.mark.parametrize(
    ("family", "given", "config"),
    [
        ("gs", {"token": "/key.json"}, {"application_credentials": "/key.json"}),
        ("gs", {"token": {"a": 1}}, {"service_account_key": '{"a": 1}'}),
        ("gs", {"token": "google_default", "project": "p"}, {}),
        (
            "az",
            {"connection_string": "AccountName=n;AccountKey=a+b==;BlobEndpoint=http://h/n"},
            {"account_name": "n", "account_key": "a+b==", "endpoint": "http://h/n"},
        ),
        ("az", {"sas_token": "sv=1&sig=x"}, {"sas_key": "sv=1&sig=x"}),
        ("az", {"credential": "sv=1&sig=x"}, {"sas_key": "sv=1&sig=x"}),
        ("az", {"credential": "a+b=="}, {"account_key": "a+b=="}),
        ("s3", {"requester_pays": True}, {"request_payer": True}),
        ("s3", {"token": "t", "secret": None}, {"session_token": "t"}),
    ],
)
def test_spellings(family: str, given: dict[str, object], config: dict[str, object]) -> None:
    assert CloudOptions.from_storage_options(family, given).config == config


def test_an_account_in_the_url() -> None:
    recipe = object_store.recipe("abfss://box@someone.dfs.core.windows.net/x", {"anon": True})
    assert recipe.label == "abfss://box@someone.dfs.core.windows.net/x"
    connected = recipe.options.connect(recipe.bucket)  # type: ignore[attr-defined]
    assert connected.config["account_name"] == "someone"


@pytest.mark.parametrize(
    "given", [{"client_options": 1}, {"client_kwargs": "x"}, {"retry_config": {"tries": 1}}]
)
def test_options_of_the_wrong_type(given: dict[str, object]) -> None:
    with pytest.raises(errors.SourceError, match=next(iter(given))):
        object_store.recipe("s3://bucket/x", given)

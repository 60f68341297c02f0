"""Web servers that fail, lie, stall or change the file: errors with words, never wrong bytes."""

from __future__ import annotations

import errno
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from reading import OpenUrl, read

from quire import errors

if TYPE_CHECKING:
    from pathlib import Path

    from misbehaving_server import Misbehaving

    from quire.store.abc import Store


@pytest.fixture
def store(open_url: OpenUrl, bad_server: Misbehaving) -> Store:
    return open_url(f"{bad_server.url}/x.bin")


def test_a_server_without_ranges_is_refused(open_url: OpenUrl, bad_server: Misbehaving) -> None:
    bad_server.behave("ignore_range")
    with pytest.raises(errors.SourceError, match=r"no range requests.*download") as caught:
        open_url(f"{bad_server.url}/x.bin")
    assert caught.value.source == f"{bad_server.url}/x.bin"


@pytest.mark.parametrize(
    "value", ["bytes 5-5/300001", "bytes 0-0", "octets 0-0/300001", None, "bytes 0-9/300001"]
)
def test_a_wrong_content_range_is_refused(
    open_url: OpenUrl, bad_server: Misbehaving, value: str | None
) -> None:
    bad_server.behave("headers", set={"Content-Range": value})
    with pytest.raises(errors.SourceError, match="no range requests"):
        open_url(f"{bad_server.url}/x.bin")


def test_an_unknown_length_is_refused(open_url: OpenUrl, bad_server: Misbehaving) -> None:
    bad_server.behave("headers", set={"Content-Range": "bytes 0-0/*"})
    with pytest.raises(errors.SourceError, match="does not say how long"):
        open_url(f"{bad_server.url}/x.bin")


def test_a_compressing_server_is_refused(open_url: OpenUrl, bad_server: Misbehaving) -> None:
    bad_server.behave("headers", set={"Content-Encoding": "gzip"})
    with pytest.raises(errors.SourceError, match="Content-Encoding: gzip"):
        open_url(f"{bad_server.url}/x.bin")


@pytest.mark.parametrize(
    ("status", "advice", "number"),
    [
        (404, "check the spelling", errno.ENOENT),
        (403, "token= or username=", errno.EACCES),
        (401, "token= or username=", errno.EACCES),
        (500, "the server fails", errno.EIO),
        (503, "the server fails", errno.EAGAIN),
        (429, "asked too often", errno.EAGAIN),
        (204, "curl -r 0-0", errno.EIO),
    ],
)
def test_statuses_at_open(
    open_url: OpenUrl, bad_server: Misbehaving, status: int, advice: str, number: int
) -> None:
    bad_server.behave("status", status=status)
    with pytest.raises(errors.SourceError, match=f"{status}.*{advice}") as caught:
        open_url(f"{bad_server.url}/x.bin")
    assert caught.value.errno == number


def test_nothing_listens(open_url: OpenUrl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
    with pytest.raises(errors.SourceError, match="nothing listens") as caught:
        open_url(url)
    assert caught.value.errno == errno.ECONNREFUSED


def test_unknown_host(open_url: OpenUrl) -> None:
    with pytest.raises(errors.SourceError, match=r"name of nowhere\.invalid:80 is not known"):
        open_url("http://nowhere.invalid/x")


@pytest.mark.parametrize("url", ["http:///x", "http://host:99999/x", "https://"])
def test_bad_urls(open_url: OpenUrl, url: str) -> None:
    with pytest.raises(errors.SourceError, match="check the URL"):
        open_url(url)


def test_another_protocol_listens(open_url: OpenUrl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def greet() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(b"220 mail ready\r\n\r\n")

        done = pool.submit(greet)
        with pytest.raises(errors.SourceError, match="not HTTP"):
            open_url(f"http://127.0.0.1:{listener.getsockname()[1]}/x")
        done.result()


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_passing_failures_are_retried(
    bad_server: Misbehaving, store: Store, content: bytes, status: int
) -> None:
    bad_server.behave("status", status=status, count=2, retry_after=True)
    assert read(store, 100, 1000) == content[100:1100]
    assert len(bad_server.requests()) == 3


@pytest.mark.parametrize("sending", ["drop", "reset", "truncate"])
def test_broken_answers_are_retried(
    bad_server: Misbehaving, store: Store, content: bytes, sending: str
) -> None:
    bad_server.behave(sending=sending, sendings=2, bytes=10)
    assert read(store, 100, 1000) == content[100:1100]


@pytest.mark.parametrize("sending", ["chunked", "close_after"])
def test_unusual_answers_are_understood(
    open_url: OpenUrl, bad_server: Misbehaving, content: bytes, sending: str
) -> None:
    bad_server.behave(sending=sending)
    store = open_url(f"{bad_server.url}/x.bin")
    for offset in (0, 5, 70_000):
        assert read(store, offset, 70_001) == content[offset : offset + 70_001]


def test_lasting_failures_give_up(bad_server: Misbehaving, store: Store) -> None:
    bad_server.behave("status", status=500)
    with pytest.raises(errors.PageIOError, match="500") as caught:
        read(store, 4096, 10)
    assert caught.value.errno == errno.EIO
    assert caught.value.offset == 4096
    assert caught.value.source == f"{bad_server.url}/x.bin"
    assert len(bad_server.requests()) == 3


def test_a_refusal_is_not_retried(bad_server: Misbehaving, store: Store) -> None:
    bad_server.behave("status", status=403)
    with pytest.raises(errors.PageIOError, match="403") as caught:
        read(store, 0, 10)
    assert caught.value.errno == errno.EACCES
    assert len(bad_server.requests()) == 1


def test_short_bodies_are_truncated_errors(bad_server: Misbehaving, store: Store) -> None:
    bad_server.behave(sending="truncate", bytes=500)
    with pytest.raises(errors.TruncatedError, match="500 of 1000 bytes"):
        read(store, 0, 1000)


def test_a_server_that_is_gone(bad_server: Misbehaving, store: Store) -> None:
    bad_server.stop()
    with pytest.raises(errors.PageIOError, match="nothing listens") as caught:
        read(store, 0, 10)
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_stalled_server_times_out(open_url: OpenUrl, bad_server: Misbehaving) -> None:
    store = open_url(f"{bad_server.url}/x.bin", timeout=1, retry_config={"max_retries": 0})
    bad_server.behave(sending="stall")
    with pytest.raises(errors.PageIOError, match="does not answer in time") as caught:
        read(store, 0, 10)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_deleted_file(store: Store, folder: Path) -> None:
    (folder / "x.bin").unlink()
    with pytest.raises(errors.PageIOError, match="404") as caught:
        read(store, 0, 10)
    assert caught.value.errno == errno.ENOENT


def test_a_file_overwritten_in_place(store: Store, folder: Path, content: bytes) -> None:
    assert read(store, 0, 10) == content[:10]
    info = (folder / "x.bin").stat()
    (folder / "x.bin").write_bytes(content[::-1])
    os.utime(folder / "x.bin", ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    with pytest.raises(errors.ChangedError, match="changed while it was mapped"):
        read(store, 0, 10)


@pytest.mark.parametrize(
    ("validators", "mtime_step_s"),
    [({}, 0), ({"ETag": 'W/"weak"'}, 10), ({"ETag": None}, 10)],
)
def test_a_server_that_ignores_conditions(
    open_url: OpenUrl,
    bad_server: Misbehaving,
    folder: Path,
    content: bytes,
    validators: dict[str, str | None],
    mtime_step_s: int,
) -> None:
    """The bytes are served, and must still not be taken for those of the old version."""
    bad_server.behave("headers", set=validators)
    store = open_url(f"{bad_server.url}/x.bin")
    if not validators:
        bad_server.behave("etag", value='"another"')
    else:
        changed = {**validators, "ETag": 'W/"w2"'} if validators["ETag"] else validators
        modified = "Thu, 01 Jan 2026 00:00:00 GMT"
        bad_server.behave("headers", set={**changed, "Last-Modified": modified})
    with pytest.raises(errors.ChangedError):
        read(store, 0, 10)


def test_an_ignored_condition_is_noticed(
    bad_server: Misbehaving, store: Store, folder: Path, content: bytes
) -> None:
    (folder / "y.bin").write_bytes(content[::-1])
    (folder / "y.bin").replace(folder / "x.bin")
    bad_server.behave("ignore_condition")
    with pytest.raises(errors.ChangedError, match="its ETag was"):
        read(store, 0, 10)


def test_without_validators_a_shorter_file_is_noticed(
    open_url: OpenUrl, bad_server: Misbehaving, folder: Path, content: bytes
) -> None:
    bad_server.behave("headers", set={"ETag": None, "Last-Modified": None})
    store = open_url(f"{bad_server.url}/x.bin")
    (folder / "x.bin").write_bytes(content[:5000])
    with pytest.raises(errors.TruncatedError, match="now it has 5000"):
        read(store, 0, 10)
    with pytest.raises(errors.TruncatedError):
        read(store, 6000, 10)


def test_ranges_that_cease(bad_server: Misbehaving, store: Store) -> None:
    bad_server.behave("ignore_range")
    with pytest.raises(errors.PageIOError, match="no longer serves range"):
        read(store, 0, 10)


def test_a_longer_body_than_asked_for(bad_server: Misbehaving, store: Store) -> None:
    bad_server.behave("headers", set={"Content-Range": "bytes 0-8/300001"})
    with pytest.raises(errors.PageIOError, match="other bytes"):
        read(store, 0, 10)


def test_close_ends_waits_between_retries(open_url: OpenUrl, bad_server: Misbehaving) -> None:
    slow = {"max_retries": 5, "backoff": {"init_backoff": 1000, "max_backoff": 1000}}
    store = open_url(f"{bad_server.url}/x.bin", retry_config={**slow, "retry_timeout": 100_000})
    bad_server.behave("status", status=500)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, store, 0, 10)
        while not bad_server.requests():
            pass
        store.close()
        with pytest.raises(errors.PageIOError):
            waiting.result(timeout=60)


def test_a_closed_store_refuses(store: Store) -> None:
    store.close()
    with pytest.raises(errors.PageIOError, match="closed"):
        read(store, 0, 10)

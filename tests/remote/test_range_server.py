"""The range server, asked by the standard library's client."""

from __future__ import annotations

import email.utils
import http.client
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from quire.tools.range_server import RangeServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def client(server: RangeServer) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    yield connection
    connection.close()


def ask(
    client: http.client.HTTPConnection, path: str = "/x.bin", method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    client.request(method, path, headers=named)
    answer = client.getresponse()
    return answer, answer.read()


def test_whole_file(client: http.client.HTTPConnection, content: bytes) -> None:
    answer, body = ask(client)
    assert (answer.status, body) == (200, content)
    assert answer.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=300000-", 300_000, 300_001),
        ("bytes=-5", 299_996, 300_001),
        ("bytes=299990-999999", 299_990, 300_001),
        ("bytes=-999999", 0, 300_001),
    ],
)
def test_ranges(
    client: http.client.HTTPConnection, content: bytes, wanted: str, start: int, stop: int
) -> None:
    answer, body = ask(client, Range=wanted)
    assert (answer.status, body) == (206, content[start:stop])
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/300001"


@pytest.mark.parametrize("wanted", ["bytes=0-1,5-6", "lines=0-1", "bytes=x-y", "bytes=5-4", "x"])
def test_ranges_to_ignore(client: http.client.HTTPConnection, content: bytes, wanted: str) -> None:
    answer, body = ask(client, Range=wanted)
    assert (answer.status, body) == (200, content)


@pytest.mark.parametrize("wanted", ["bytes=300001-", "bytes=300001-300002", "bytes=-0"])
def test_ranges_outside(client: http.client.HTTPConnection, wanted: str) -> None:
    answer, _ = ask(client, Range=wanted)
    assert answer.status == 416
    assert answer.headers["Content-Range"] == "bytes */300001"


def test_conditions(client: http.client.HTTPConnection, content: bytes) -> None:
    answer, _ = ask(client, method="HEAD")
    etag, modified = answer.headers["ETag"], answer.headers["Last-Modified"]
    earlier = email.utils.formatdate(0, usegmt=True)
    for status, headers in (
        (200, {"If_Match": etag}),
        (200, {"If_Match": f'"other", {etag}'}),
        (200, {"If_Match": "*"}),
        (412, {"If_Match": '"other"'}),
        (200, {"If_Unmodified_Since": modified}),
        (200, {"If_Unmodified_Since": "nonsense"}),
        (412, {"If_Unmodified_Since": earlier}),
        (206, {"If_Range": etag, "Range": "bytes=0-0"}),
        (206, {"If_Range": modified, "Range": "bytes=0-0"}),
        (200, {"If_Range": '"other"', "Range": "bytes=0-0"}),
    ):
        assert ask(client, **headers)[0].status == status, headers


def test_a_new_version_has_a_new_etag(client: http.client.HTTPConnection, folder: Path) -> None:
    before, _ = ask(client)
    (folder / "y.bin").write_bytes(b"new")
    (folder / "y.bin").replace(folder / "x.bin")
    after, body = ask(client)
    assert body == b"new"
    assert before.headers["ETag"] != after.headers["ETag"]


def test_what_is_not_there(client: http.client.HTTPConnection, folder: Path) -> None:
    (folder / "inner").mkdir()
    for path in ("/nothing", "/", "/inner", "/x.bin/y", "/%00", "/" + "x" * 5000):
        assert ask(client, path)[0].status == 404, path


def test_nothing_outside_the_directory(client: http.client.HTTPConnection, folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes(b"secret")
    (folder / "link").symlink_to(outside)
    (folder / "inner_link").symlink_to("x.bin")
    for path in ("/../outside", "/%2e%2e/outside", "/link", "//etc/passwd", "/../served2"):
        answer, body = ask(client, path)
        assert answer.status in (403, 404), path
        assert b"secret" not in body
    assert ask(client, "/inner_link")[0].status == 200


def test_other_methods(client: http.client.HTTPConnection) -> None:
    answer, _ = ask(client, method="DELETE")
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"


def test_head_has_no_body(client: http.client.HTTPConnection) -> None:
    answer, body = ask(client, method="HEAD")
    assert body == b""
    assert answer.headers["Content-Length"] == "300001"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET /x.bin\r\n\r\n",
        b"GET /x.bin HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /x.bin HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"x" * 70_000,
    ],
)
def test_bad_requests(server: RangeServer, request_bytes: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(request_bytes)
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_one_connection_is_kept(client: http.client.HTTPConnection) -> None:
    ask(client)
    kept = client.sock
    ask(client)
    assert client.sock is kept
    ask(client, Connection="close")
    assert kept.recv(1) == b"" if client.sock is kept else True


def test_a_file_cut_short_while_sent_ends_the_connection(server: RangeServer, folder: Path) -> None:
    (folder / "big").write_bytes(bytes(64 << 20))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET /big HTTP/1.1\r\n\r\n")
        got = len(client.recv(100))
        os.truncate(folder / "big", 0)
        while more := client.recv(1 << 20):
            got += len(more)
        assert got < 64 << 20


def test_ends_with_its_parent(folder: Path) -> None:
    """However the parent ends: its end of the pipe closes."""
    server = RangeServer(folder)
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(60) == 0
    server.stop()


def test_a_server_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        RangeServer(tmp_path, command=[sys.executable, "-c", ""])


def test_the_command_says_how_it_is_used() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "quire.tools.range_server", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "directory" in told.stdout

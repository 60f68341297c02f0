"""Files on a well-behaved web server."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from misbehaving_server import Misbehaving
from reading import OpenUrl, read

from quire import errors
from quire.store import object_store

if TYPE_CHECKING:
    from quire.tools.range_server import RangeServer


def test_reads_every_part(open_url: OpenUrl, server: RangeServer, content: bytes) -> None:
    store = open_url(f"{server.url}/x.bin")
    assert store.size == len(content)
    for offset, length in ((0, 1), (0, len(content)), (len(content) - 1, 1), (4096, 65536), (7, 0)):
        assert read(store, offset, length) == content[offset : offset + length]
    store.close()


def test_many_threads_read_at_once(open_url: OpenUrl, server: RangeServer, content: bytes) -> None:
    store = open_url(f"{server.url}/x.bin")
    offsets = range(0, len(content) - 5000, 1000)
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda offset: read(store, offset, 5000), offsets))
    assert parts == [content[offset : offset + 5000] for offset in offsets]


def test_one_connection_serves_serial_reads(open_url: OpenUrl, bad_server: Misbehaving) -> None:
    bad_server.behave()
    store = open_url(f"{bad_server.url}/x.bin")
    for offset in range(20):
        read(store, offset, 100)
    assert len(store._idle) == 1  # type: ignore[attr-defined]


def test_empty_file(open_url: OpenUrl, server: RangeServer, folder: Path) -> None:
    (folder / "empty").touch()
    assert open_url(f"{server.url}/empty").size == 0


def test_names_are_encoded(open_url: OpenUrl, server: RangeServer, folder: Path) -> None:
    (folder / "a b+ü%.bin").write_bytes(b"name")
    assert read(open_url(f"{server.url}/a b+ü%25.bin"), 0, 4) == b"name"
    assert read(open_url(f"{server.url}/a%20b+%C3%BC%25.bin"), 0, 4) == b"name"


def test_the_pin_is_sent_with_each_read(open_url: OpenUrl, bad_server: Misbehaving) -> None:
    store = open_url(f"{bad_server.url}/x.bin")
    read(store, 10, 20)
    first, second = bad_server.requests()
    assert "if-match" not in first["headers"]
    assert second["headers"]["if-match"] == store.version
    assert second["headers"]["range"] == "bytes=10-29"
    assert second["headers"]["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("removed", "sent"),
    [
        ({"ETag": None}, "if-unmodified-since"),
        ({"ETag": 'W/"weak"'}, "if-unmodified-since"),
        ({"ETag": None, "Last-Modified": None}, None),
    ],
)
def test_weaker_validators(
    open_url: OpenUrl, bad_server: Misbehaving, removed: dict[str, str | None], sent: str | None
) -> None:
    bad_server.behave("headers", set=removed)
    store = open_url(f"{bad_server.url}/x.bin")
    read(store, 0, 10)
    headers = bad_server.requests()[-1]["headers"]
    assert "if-match" not in headers
    assert (sent in headers) if sent else ("if-unmodified-since" not in headers)
    assert (store.version is None) == (sent is None)


def test_recipe_travels_and_hides_secrets(server: RangeServer, content: bytes) -> None:
    url = f"{server.url}/x.bin?signature=SECRET".replace("http://", "http://me:SECRET@")
    recipe = object_store.recipe(url, {"headers": {"X-Key": "SECRET"}})
    assert "SECRET" not in recipe.label + repr(recipe)
    assert recipe.label == f"{server.url}/x.bin"
    copy = pickle.loads(pickle.dumps(recipe))
    assert copy == recipe
    with closing(copy.open()) as opened:
        assert read(opened, 0, 9) == content[:9]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"username": "me", "password": "pw"}, {"authorization": "Basic bWU6cHc="}),
        ({"auth": ("me", "pw")}, {"authorization": "Basic bWU6cHc="}),
        ({"token": "abc"}, {"authorization": "Bearer abc"}),
        ({"headers": {"X-A": "1"}}, {"x-a": "1"}),
        ({"client_kwargs": {"headers": {"X-A": "1"}}}, {"x-a": "1"}),
        ({"client_options": {"default_headers": {"X-A": b"1"}}}, {"x-a": "1"}),
        ({"client_options": {"user_agent": "mine"}}, {"user-agent": "mine"}),
    ],
)
def test_options_reach_the_server(
    open_url: OpenUrl, bad_server: Misbehaving, options: dict[str, object], expected: dict[str, str]
) -> None:
    open_url(f"{bad_server.url}/x.bin", **options)
    assert expected.items() <= bad_server.requests()[-1]["headers"].items()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"timeout": "soon"}, "timeout"),
        ({"headers": "X"}, "headers"),
        ({"headers": {"X": "a\r\nY: b"}}, "X"),
        ({"retry_config": {"tries": 1}}, "tries"),
        ({"client_options": 1}, "client_options"),
        ({"auth": 1}, "auth"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(errors.SourceError, match=named):
        object_store.recipe("http://127.0.0.1/x", options)


def test_redirects_are_followed_without_secrets(
    open_url: OpenUrl, server: RangeServer, bad_server: Misbehaving, content: bytes
) -> None:
    with Misbehaving(Path(os.fspath(server.process.args[-1]))) as other:  # type: ignore[index]
        bad_server.behave("redirect", to=f"{other.url}/x.bin")
        store = open_url(f"{bad_server.url}/moved", token="SECRET", headers={"X-A": "1"})
        assert read(store, 5, 50) == content[5:55]
        assert [request["path"] for request in bad_server.requests()] == ["/moved"]
        for request in other.requests():
            assert "authorization" not in request["headers"]
            assert request["headers"]["x-a"] == "1"


def test_an_expired_redirect_is_looked_up_afresh(
    open_url: OpenUrl, bad_server: Misbehaving, folder: Path, content: bytes
) -> None:
    with Misbehaving(folder) as other:
        bad_server.behave("redirect", to=f"{other.url}/x.bin")
        store = open_url(f"{bad_server.url}/moved")
        other.behave("status", status=403, count=1)
        assert read(store, 5, 50) == content[5:55]
        assert len(bad_server.requests()) == 2


def test_redirect_loops_end(open_url: OpenUrl, bad_server: Misbehaving) -> None:
    bad_server.behave("redirect", to="/x.bin")
    with pytest.raises(errors.SourceError, match="redirects more than"):
        open_url(f"{bad_server.url}/x.bin")


def test_plain_proxy(
    open_url: OpenUrl, bad_server: Misbehaving, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The misbehaving server also serves as proxy: it must see the whole URL asked for."""
    monkeypatch.setenv("http_proxy", bad_server.url.replace("//", "//user:pw@"))
    with pytest.raises(errors.SourceError, match="404"):
        open_url("http://elsewhere.invalid/x.bin")
    request = bad_server.requests()[0]
    assert "elsewhere.invalid" in request["path"]
    assert request["headers"]["proxy-authorization"] == "Basic dXNlcjpwdw=="
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read(open_url(f"{bad_server.url}/x.bin"), 0, 5) == content[:5]


def test_opening_http_imports_little() -> None:
    """A pager process must start fast: no array library, no cloud client, no http.client."""
    script = (
        "import sys; from quire.store.http_store import HttpRecipe; import quire.pager.server;"
        "print(*sorted(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"numpy", "obstore", "fsspec", "http.client", "ssl", "asyncio"} & set(loaded)

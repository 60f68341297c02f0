"""Objects in S3, by a moto server that checks requests as S3 does."""

from __future__ import annotations

import errno
import pickle
import socket
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from core_side import Answer, CoreSide
from reading import OpenUrl, read

from quire import errors
from quire.store import object_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "some folder/x#1%20+ü.bin"
URL = f"s3://quire-test/{KEY}"
IO, CHANGED = 1, 3


@pytest.fixture
def content(bucket: Any, content: bytes) -> bytes:
    """The bytes of the object at URL."""
    bucket.put_object(Key=KEY, Body=content, ACL="public-read")
    return content


@pytest.fixture
def options(s3_endpoint: str) -> dict[str, object]:
    return {
        "endpoint": s3_endpoint,
        "access_key_id": "key",
        "secret_access_key": "secret",
        "region": "us-east-1",
    }


def test_reads_every_part(open_url: OpenUrl, options: dict[str, object], content: bytes) -> None:
    store = open_url(URL, **options)
    assert store.size == len(content)
    assert store.label == URL
    assert store.version
    for offset, length in ((0, 1), (0, len(content)), (len(content) - 1, 1), (4096, 65536), (7, 0)):
        assert read(store, offset, length) == content[offset : offset + length]


@pytest.mark.parametrize(
    "spelling",
    [
        {"key": "key", "secret": "secret", "client_kwargs": {"region_name": "us-east-1"}},
        {"key": "key", "secret": "secret", "default_block_size": 4096, "use_ssl": False},
        {"config": {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}},
        {"anon": True},
        {"skip_signature": True, "client_options": {"allow_http": True, "timeout": 10}},
    ],
)
@pytest.mark.parametrize("endpoint", ["endpoint", "endpoint_url", "aws_endpoint_url"])
def test_spellings(
    open_url: OpenUrl,
    s3_endpoint: str,
    content: bytes,
    spelling: dict[str, object],
    endpoint: str,
) -> None:
    store = open_url(URL, **{endpoint: s3_endpoint}, **spelling)
    assert read(store, 3, 9) == content[3:12]


def test_fsspec_endpoint_in_client_kwargs(
    open_url: OpenUrl, s3_endpoint: str, content: bytes
) -> None:
    store = open_url(URL, anon=True, client_kwargs={"endpoint_url": s3_endpoint})
    assert read(store, 3, 9) == content[3:12]


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"])
def test_environment(
    open_url: OpenUrl,
    s3_endpoint: str,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert read(open_url(URL), 0, 5) == content[:5]


@pytest.mark.parametrize("by_option", [True, False])
def test_profile(
    open_url: OpenUrl,
    s3_endpoint: str,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    by_option: bool,
) -> None:
    (tmp_path / "credentials").write_text(
        "[mine]\naws_access_key_id = key\naws_secret_access_key = secret\n"
    )
    (tmp_path / "config").write_text("[profile mine]\nregion = eu-west-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    named = {"profile": "mine"} if by_option else {}
    if not by_option:
        monkeypatch.setenv("AWS_PROFILE", "mine")
    assert read(open_url(URL, endpoint=s3_endpoint, **named), 0, 5) == content[:5]
    with pytest.raises(errors.SourceError, match=r"profile 'other' cannot be used"):
        open_url(URL, endpoint=s3_endpoint, profile="other")


def test_empty_object(open_url: OpenUrl, options: dict[str, object], bucket: Any) -> None:
    bucket.put_object(Key="empty", Body=b"")
    assert open_url("s3://quire-test/empty", **options).size == 0


@pytest.mark.parametrize("url", ["s3://quire-test/nothing", "s3://no-such-bucket/x"])
def test_what_is_not_there(
    open_url: OpenUrl, options: dict[str, object], bucket: Any, url: str
) -> None:
    with pytest.raises(errors.SourceError, match=r"404.*check the spelling") as caught:
        open_url(url, **options)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.source == url


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3:///key"])
def test_urls_without_an_object(open_url: OpenUrl, url: str) -> None:
    with pytest.raises(errors.SourceError, match="names no object"):
        open_url(url)


def test_unknown_options_are_named(open_url: OpenUrl, options: dict[str, object]) -> None:
    with pytest.raises(errors.SourceError, match="'nonsense'"):
        open_url(URL, nonsense=1, **options)


def test_nothing_listens(open_url: OpenUrl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(errors.SourceError, match="connection refused") as caught:
        open_url(URL, endpoint=endpoint, anon=True)
    assert caught.value.errno == errno.ECONNREFUSED


def test_plain_http_must_be_meant(open_url: OpenUrl, s3_endpoint: str) -> None:
    with pytest.raises(errors.SourceError):
        open_url(URL, endpoint=s3_endpoint.replace("http:", "https:"), anon=True)


def test_obstore_is_named_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.SourceError, match=r"pip install 'quire\[remote\]'"):
        object_store.recipe(URL)


def test_recipe_travels_and_hides_secrets(options: dict[str, object], content: bytes) -> None:
    recipe = object_store.recipe(URL, {**options, "session_token": "HIDDEN"})
    assert "HIDDEN" not in repr(recipe)
    copy = pickle.loads(pickle.dumps(recipe))
    assert copy == recipe


@pytest.fixture
def checking_server(s3_endpoint: str, bucket: Any) -> Iterator[None]:
    """From here on moto checks signatures and permissions."""
    order = urllib.request.Request(
        f"{s3_endpoint}/moto-api/reset-auth",
        data=b"0",
        method="POST",
        headers={"Content-Type": "text/plain"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(order).close()
    yield
    order.data = b"1000000000"
    opener.open(order).close()


def test_wrong_credentials(
    open_url: OpenUrl, options: dict[str, object], content: bytes, checking_server: None
) -> None:
    with pytest.raises(errors.SourceError, match=r"403.*AWS_ACCESS_KEY_ID") as caught:
        open_url(URL, **options)
    assert caught.value.errno == errno.EACCES


def test_an_object_overwritten_while_open(
    open_url: OpenUrl, options: dict[str, object], content: bytes, bucket: Any
) -> None:
    store = open_url(URL, **options)
    assert read(store, 0, 10) == content[:10]
    bucket.put_object(Key=KEY, Body=content[::-1])
    with pytest.raises(errors.ChangedError, match="changed while it was mapped") as caught:
        read(store, 4096, 10)
    assert caught.value.offset == 4096


def test_an_object_deleted_while_open(
    open_url: OpenUrl, options: dict[str, object], content: bytes, bucket: Any
) -> None:
    store = open_url(URL, **options)
    bucket.Object(KEY).delete()
    with pytest.raises(errors.PageIOError, match="404") as caught:
        read(store, 0, 10)
    assert caught.value.errno == errno.ENOENT


def test_through_the_pager_process(options: dict[str, object], content: bytes, bucket: Any) -> None:
    with CoreSide(object_store.recipe(URL, options)) as core:
        assert core.first["size"] == len(content)
        assert core.first["kind"] == "s3"
        assert core.read(1000, 5000) == content[1000:6000]
        bucket.put_object(Key=KEY, Body=content[::-1])
        answer = core.read(1000, 5000)
        assert isinstance(answer, Answer)
        assert answer.code == CHANGED

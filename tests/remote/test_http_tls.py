"""https:// sources: trusted, untrusted and misdirected."""

from __future__ import annotations

import datetime
import ipaddress
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from misbehaving_server import Misbehaving
from reading import OpenUrl, read

from quire import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from quire.tools.range_server import RangeServer


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1 and its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "quire test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + pem)
    return path


@pytest.fixture
def tls_server(folder: Path, certificate: Path) -> Iterator[Misbehaving]:
    with Misbehaving(folder, certificate) as running:
        yield running


def test_a_private_authority(
    open_url: OpenUrl, tls_server: Misbehaving, certificate: Path, content: bytes
) -> None:
    store = open_url(f"{tls_server.url}/x.bin", root_certificate=certificate.read_text())
    assert read(store, 0, len(content)) == content
    assert read(store, 100, 1000) == content[100:1100]


def test_an_authority_from_the_environment(
    open_url: OpenUrl,
    tls_server: Misbehaving,
    certificate: Path,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from quire.store.http_connection import tls_context

    tls_context.cache_clear()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert read(open_url(f"{tls_server.url}/x.bin"), 0, 9) == content[:9]
    tls_context.cache_clear()


def test_unverified_on_request(open_url: OpenUrl, tls_server: Misbehaving, content: bytes) -> None:
    store = open_url(f"{tls_server.url}/x.bin", allow_invalid_certificates=True)
    assert read(store, 0, 9) == content[:9]


def test_an_untrusted_certificate(open_url: OpenUrl, tls_server: Misbehaving) -> None:
    with pytest.raises(errors.SourceError, match=r"not trusted.*root_certificate="):
        open_url(f"{tls_server.url}/x.bin")


def test_tls_asked_of_a_plain_server(open_url: OpenUrl, server: RangeServer) -> None:
    with pytest.raises(errors.SourceError, match="does not speak TLS"):
        open_url(server.url.replace("http:", "https:") + "/x.bin")


def test_failures_are_retried(
    open_url: OpenUrl, tls_server: Misbehaving, certificate: Path, content: bytes
) -> None:
    store = open_url(f"{tls_server.url}/x.bin", root_certificate=certificate.read_text())
    tls_server.behave(sending="truncate", bytes=100, sendings=2)
    assert read(store, 50, 5000) == content[50:5050]


def test_a_stalled_server_times_out(
    open_url: OpenUrl, tls_server: Misbehaving, certificate: Path
) -> None:
    store = open_url(
        f"{tls_server.url}/x.bin",
        root_certificate=certificate.read_text(),
        timeout="1s",
        retry_config={"max_retries": 0},
    )
    tls_server.behave(sending="stall")
    with pytest.raises(errors.PageIOError, match="does not answer in time"):
        read(store, 0, 10)

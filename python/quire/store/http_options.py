"""``storage_options`` of http:// and https:// sources, in obstore's and fsspec's spelling.

===========================  =====================================================================
``headers``                  dict sent with each request (fsspec); also ``default_headers``
``username``, ``password``   basic authentication; ``auth=(user, password)`` is the same
``token``                    sent as ``Authorization: Bearer``; also ``bearer_token``
``timeout``                  longest silence of the server, 30 s; ``connect_timeout`` 5 s
``allow_invalid_certificates``  True: any certificate is trusted (tests only)
``root_certificate``         PEM text of a private authority, beside the system's
``proxy_url``                overrides the environment's proxies; "" for none
``user_agent``               replaces ``quire``
``retry_config``             obstore's: see `quire.store.retry`
===========================  =====================================================================

All may also stand inside ``client_options`` (obstore) or ``client_kwargs`` (fsspec).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quire.errors import SourceError
from quire.store.http_connection import Endpoint, Target, basic, proxy_for
from quire.store.retry import RetryPolicy, seconds

__all__ = ["HttpOptions"]

KNOWN = frozenset(
    [
        "headers",
        "default_headers",
        "username",
        "password",
        "auth",
        "token",
        "bearer_token",
        "timeout",
        "read_timeout",
        "connect_timeout",
        "allow_invalid_certificates",
        "root_certificate",
        "proxy_url",
        "user_agent",
        "retry_config",
        "client_options",
        "client_kwargs",
    ]
)
WITHOUT_MEANING = frozenset(
    [
        "allow_http",
        "anon",
        "skip_signature",
        "block_size",
        "cache_type",
        "cache_options",
        "asynchronous",
        "simple_links",
        "same_scheme",
        "size_policy",
        "encoded",
        "use_listings_cache",
        "skip_instance_cache",
        "default_content_type",
        "http1_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "trust_env",
    ]
)
SECRET_HEADERS = ("authorization", "cookie")


@dataclass(frozen=True)
class HttpOptions:
    """Checked options; picklable, and never shown because they may hold credentials."""

    headers: tuple[tuple[str, str], ...] = ()
    authorization: str | None = None
    timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    verify: bool = True
    root_certificate: str | None = None
    proxy: str | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def from_storage_options(cls, options: Mapping[str, object] | None) -> HttpOptions:
        """Checks and takes over what the user gave.

        Raises:
            quire.SourceError: an option that http sources do not have, or a value of the wrong
                type; the message names it.

        >>> HttpOptions.from_storage_options({"timeout": "2s"}).timeout_s
        2.0
        """
        flat = flattened(options or {})
        headers = {"User-Agent": str(flat.get("user_agent", "quire")), "Accept": "*/*"}
        headers["Accept-Encoding"] = "identity"
        for name in ("default_headers", "headers"):
            given = flat.get(name) or {}
            if not isinstance(given, Mapping):
                raise SourceError(f"{name}={given!r} must be a dict of header names and values")
            headers.update({str(key): _header_value(key, value) for key, value in given.items()})
        timeout = flat.get("timeout", flat.get("read_timeout", 30.0))
        root = flat.get("root_certificate")
        proxy = flat.get("proxy_url")
        return cls(
            headers=tuple(headers.items()),
            authorization=_authorization(flat),
            timeout_s=seconds(timeout, "timeout"),
            connect_timeout_s=seconds(flat.get("connect_timeout", 5.0), "connect_timeout"),
            verify=not flat.get("allow_invalid_certificates", False),
            root_certificate=root.decode() if isinstance(root, bytes) else _text(root),
            proxy=None if proxy is None else str(proxy),
            retry=RetryPolicy.from_config(flat.get("retry_config")),
        )

    def headers_for(self, origin: Target, target: Target) -> dict[str, str]:
        """The headers of a request to ``target``; secrets go to the host of the user's URL only."""
        headers = dict(self.headers)
        if (origin.scheme, origin.host, origin.port) != (target.scheme, target.host, target.port):
            return {k: v for k, v in headers.items() if k.lower() not in SECRET_HEADERS}
        authorization = self.authorization or origin.authorization
        if authorization is not None:
            headers["Authorization"] = authorization
        return headers

    def endpoint(self, target: Target) -> Endpoint:
        """Whom to connect to for ``target``."""
        proxy = proxy_for(target.scheme, target.host) if self.proxy is None else self.proxy
        return Endpoint(
            target.scheme,
            target.host,
            target.port,
            proxy or None,
            self.connect_timeout_s,
            self.timeout_s,
            self.verify,
            self.root_certificate,
        )


def flattened(options: Mapping[str, object]) -> dict[str, object]:
    """The options with the nested dicts of obstore and fsspec spread out.

    Raises:
        quire.SourceError: an unknown name.
    """
    flat: dict[str, object] = {}
    for name, value in options.items():
        if name in ("client_options", "client_kwargs"):
            if not isinstance(value, Mapping):
                raise SourceError(f"storage_options {name}={value!r} must be a dict")
            flat.update(value)
        else:
            flat[name] = value
    unknown = sorted(str(name) for name in flat if name not in KNOWN | WITHOUT_MEANING)
    if unknown:
        raise SourceError(
            f"storage_options of an http source have no {', '.join(unknown)}: they are "
            f"{', '.join(sorted(KNOWN))}"
        )
    return flat


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _header_value(name: object, value: object) -> str:
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    if any(char in f"{name}{text}" for char in "\r\n\0"):
        raise SourceError(f"the header {name!r} holds a line break: remove it")
    return text


def _authorization(flat: Mapping[str, object]) -> str | None:
    token = flat.get("bearer_token", flat.get("token"))
    if token is not None:
        return _header_value("Authorization", f"Bearer {token}")
    user, password = flat.get("username"), flat.get("password", "")
    auth = flat.get("auth")
    if auth is not None:
        login = getattr(auth, "login", None)  # aiohttp.BasicAuth, as fsspec takes it
        if login is not None:
            user, password = login, getattr(auth, "password", "")
        elif isinstance(auth, tuple | list) and len(auth) == 2:
            user, password = auth
        else:
            raise SourceError("auth must be (user, password)")
    return None if user is None else basic(f"{user}:{password}")

"""A file on a web server, read by range requests.

At open, one request for the first byte must be answered 206 with the right ``Content-Range``; from
that reply come the size, the ETag and the Last-Modified that are pinned. Each later request
carries the pin as its condition (``If-Match`` with a strong ETag, else ``If-Unmodified-Since``),
and because servers may ignore conditions the reply's own validators are compared too: an object
that changes raises, and versions are never mixed. Where the server gives neither validator only
the size can be compared; ``version`` is then None.

Redirects are followed at open and remembered; a redirect target that stops answering (a signed
URL that has expired) is looked up afresh once.
"""

from __future__ import annotations

import errno
import re
import socket
import threading
import urllib.parse
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, TypeVar

from quire.errors import ChangedError, Error, PageIOError, SourceError, TruncatedError
from quire.store.abc import Store
from quire.store.http_connection import (
    BadReplyError,
    Endpoint,
    HttpConnection,
    Reply,
    ShortBodyError,
    Target,
    request_start,
)
from quire.store.http_options import HttpOptions
from quire.store.remote_advice import advice_for_error, advice_for_status, public_url

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HttpRecipe", "HttpStore"]

T = TypeVar("T")

REDIRECTS = (301, 302, 303, 307, 308)
REDIRECTS_MAX = 10
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
IDLE_CONNECTIONS_MAX = 64
ERRNO_OF_STATUS = {
    401: errno.EACCES,
    403: errno.EACCES,
    404: errno.ENOENT,
    408: errno.ETIMEDOUT,
    410: errno.ENOENT,
    429: errno.EAGAIN,
    503: errno.EAGAIN,
    504: errno.ETIMEDOUT,
}


@dataclass(frozen=True)
class HttpRecipe:
    """Opens `HttpStore` in the pager process."""

    url: str = field(repr=False)
    options: HttpOptions = field(default_factory=HttpOptions, repr=False)

    @property
    def label(self) -> str:
        """The URL without user, password and query."""
        return public_url(self.url)

    def open(self) -> HttpStore:
        """Asks the server for the first byte and pins what it answers.

        Raises:
            quire.SourceError: no answer, a refusal, or a server without range requests.
        """
        return HttpStore(self.url, self.options)


@dataclass(frozen=True)
class Pin:
    """What was true of the object at open."""

    size: int = 0
    etag: str | None = None
    modified: str | None = None

    @property
    def condition(self) -> dict[str, str]:
        """The header that asks the server to refuse when the object has changed.

        A weak ETag never matches in ``If-Match`` (RFC 9110, 13.1.1).
        """
        if self.etag is not None and not self.etag.startswith("W/"):
            return {"If-Match": self.etag}
        return {"If-Unmodified-Since": self.modified} if self.modified else {}

    def difference(self, reply: Reply, total: int | None) -> str | None:
        """What in a reply shows another version of the object, in words, or None."""
        etag = reply.headers.get("etag")
        modified = reply.headers.get("last-modified")
        if self.etag is not None and etag is not None:
            if etag != self.etag:
                return f"its ETag was {self.etag}, now it is {etag}"
        elif self.modified is not None and modified is not None and modified != self.modified:
            return f"it was last modified {self.modified}, now {modified}"
        if total is not None and total != self.size:
            return f"it had {self.size} bytes, now it has {total}"
        return None


@dataclass(frozen=True)
class Route:
    """Where requests go now, and how they begin: made once, used by every read."""

    target: Target
    endpoint: Endpoint
    start: bytes


class StatusError(OSError):
    """The server answered with a status that is not the one wanted."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(
            ERRNO_OF_STATUS.get(reply.status, errno.EIO),
            f"the server answered {reply.status} {reply.reason}".rstrip(),
        )
        self.reply = reply


class HttpStore(Store):
    """One object of an HTTP server; reads may come from any thread."""

    kind = "http"

    def __init__(self, url: str, options: HttpOptions) -> None:
        """Opens ``url``; see `HttpRecipe.open`."""
        self._label = public_url(url)
        self._options = options
        self._closed = threading.Event()
        self._idle: deque[HttpConnection] = deque(maxlen=IDLE_CONNECTIONS_MAX)
        self._pin = Pin()
        try:
            self._origin = Target.parse(url)
            self._route = self._route_to(self._origin)
            self._insist(self._probe)
        except Error:
            self.close()
            raise
        except (OSError, ValueError) as error:
            self.close()
            self._refuse(error)

    @property
    def size(self) -> int:
        """Bytes of the object, from ``Content-Range``."""
        return self._pin.size

    @property
    def label(self) -> str:
        """The URL without user, password and query."""
        return self._label

    @property
    def version(self) -> str | None:
        """The pinned ETag, else Last-Modified; None where the server gives neither."""
        return self._pin.etag or self._pin.modified

    @property
    def details(self) -> dict[str, object]:
        """What `quire info` shows of the server's answer."""
        return {"etag": self._pin.etag, "last_modified": self._pin.modified}

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from ``offset`` by one range request, tried again per retry_config.

        Raises:
            quire.ChangedError: the object is no longer the one that was opened.
            quire.TruncatedError: the server's answers end early.
            quire.PageIOError: any other failure, with errno.
        """
        if not len(buffer):
            return
        try:
            self._insist(lambda: self._read(offset, buffer))
        except ShortBodyError as error:
            raise TruncatedError(
                f"{error}, and so again when tried again: see whether the file on the server, or "
                "what stands between, was cut short",
                source=self._label,
                offset=offset,
            ) from error
        except Error:  # what `_read` found wrong is said already
            raise
        except OSError as error:
            number = error.errno if (error.errno or 0) > 0 else None
            raise PageIOError(
                f"{_words(error)}: {self._advice(error)}",
                source=self._label,
                offset=offset,
                errno=number,
            ) from error

    def close(self) -> None:
        """Closes idle connections and ends waits between retries."""
        self._closed.set()
        self._drop_idle()

    def _insist(self, attempt: Callable[[], T]) -> T:
        """Runs ``attempt`` again while its failure may pass and the retry policy allows."""
        waits = self._options.retry.waits_s()
        while True:
            try:
                return attempt()
            except Error:
                raise
            except OSError as error:
                wait = next(waits, None) if _may_pass(error) else None
                if wait is None or self._closed.wait(self._patience(error, wait)):
                    raise

    def _patience(self, error: OSError, wait_s: float) -> float:
        """The wait before a retry: at least what the server's ``Retry-After`` asks for."""
        asked = error.reply.headers.get("retry-after", "") if isinstance(error, StatusError) else ""
        at_least = float(asked) if asked.isascii() and asked.isdigit() else 0.0
        return max(wait_s, min(at_least, self._options.retry.max_backoff_s))

    def _probe(self) -> None:
        """Pins the object from the answer to a request for its first byte."""
        self._route = self._route_to(self._origin)
        connection, reply = self._ask(0, 0, at_open=True)
        try:
            size = self._probed_size(reply)
            connection.receive_excerpt(reply)
        finally:
            self._give_back(connection, keep=reply.status == 206)
        self._pin = Pin(size, reply.headers.get("etag"), reply.headers.get("last-modified"))
        self._route = self._route_to(self._route.target)

    def _probed_size(self, reply: Reply) -> int:
        first, last, total = content_range(reply)
        if reply.status == 416 and total == 0:
            return 0
        if reply.status == 200 and reply.headers.get("content-length") == "0":
            return 0
        if reply.status == 200 or (reply.status == 206 and (first, last) != (0, 0)):
            raise SourceError(
                f"the server answers {reply.status} to a request for one byte: it has no range "
                "requests, so single pages cannot be fetched; download the file and open the "
                "copy, or serve it by a server with ranges (nginx, Apache, any object store, "
                "`python -m quire.tools.range_server DIRECTORY`)",
                source=self._label,
            )
        if reply.status != 206:
            raise StatusError(reply)
        if total is None:
            raise SourceError(
                "the server does not say how long the file is (its Content-Range ends in '*'): "
                "download the file and open the copy",
                source=self._label,
            )
        encoding = reply.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise SourceError(
                f"the server sends the file with Content-Encoding: {encoding}, so its offsets "
                "are not the file's: switch that off for this file, or download it",
                source=self._label,
            )
        return total

    def _read(self, offset: int, buffer: memoryview) -> None:
        connection, reply = self._ask(offset, offset + len(buffer) - 1)
        keep = False
        try:
            self._check(reply, offset, len(buffer))
            got = connection.receive_body(reply, buffer)
            if got != len(buffer):
                raise ShortBodyError(f"the server's reply ended after {got} of {len(buffer)} bytes")
            keep = True
        finally:
            self._give_back(connection, keep=keep)

    def _check(self, reply: Reply, offset: int, length: int) -> None:
        """Accepts only the bytes that were asked for, of the version that was opened."""
        first, last, total = content_range(reply)
        difference = self._pin.difference(reply, total) if reply.status in (200, 206, 416) else None
        if reply.status == 412:
            difference = "the server says that its ETag or modification time is another"
        if difference is not None:
            kind = ChangedError if self.version else TruncatedError
            raise kind(
                f"the object changed while it was mapped ({difference}): close the mapping and "
                "open it again",
                source=self._label,
                offset=offset,
            )
        if reply.status == 206 and (first, last) == (offset, offset + length - 1):
            return
        if reply.status in (200, 206):
            raise PageIOError(
                f"the server answered {reply.status} with other bytes than were asked for: it no "
                "longer serves range requests for this file",
                source=self._label,
                offset=offset,
                errno=errno.EIO,
            )
        raise StatusError(reply)

    def _route_to(self, target: Target) -> Route:
        """The way to ``target``, with the pin as the condition of every request."""
        endpoint = self._options.endpoint(target)
        headers = self._options.headers_for(self._origin, target) | self._pin.condition
        return Route(target, endpoint, request_start(endpoint, target.path, headers))

    def _ask(self, first: int, last: int, *, at_open: bool = False) -> tuple[HttpConnection, Reply]:
        """Sends one range request, follows redirects, and returns the head of the answer."""
        wanted = b"Range: bytes=%d-%d\r\n\r\n" % (first, last)
        afresh = not at_open
        for _ in range(REDIRECTS_MAX):
            route = self._route
            connection, reply = self._exchange(route.endpoint, route.start + wanted)
            if reply.status in (200, 206, 412, 416):
                return connection, reply
            connection.receive_excerpt(reply)
            self._give_back(connection, keep=True)
            where = reply.headers.get("location")
            if reply.status in REDIRECTS and where:
                self._route = self._route_to(redirect_target(route.target, where))
            elif afresh and route.target != self._origin and 400 <= reply.status < 500:
                self._route, afresh = self._route_to(self._origin), False
            else:
                raise StatusError(reply)
        raise SourceError(
            f"the server redirects more than {REDIRECTS_MAX} times: check the URL in a browser",
            source=self._label,
        )

    def _exchange(self, endpoint: Endpoint, request: bytes) -> tuple[HttpConnection, Reply]:
        """One request on an idle connection or a new one; a stale idle one is replaced."""
        while True:
            connection = self._connection(endpoint)
            stale = not connection.fresh
            try:
                connection.send(request)
                return connection, connection.receive_head()
            except BaseException as error:
                connection.close()
                self._drop_idle()
                if not (stale and isinstance(error, ConnectionError)):
                    raise

    def _connection(self, endpoint: Endpoint) -> HttpConnection:
        """An idle connection, the one used last first, or a new one."""
        with suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if connection.endpoint == endpoint:
                    return connection
                connection.close()
        if self._closed.is_set():
            raise OSError(errno.EBADF, "the store is closed")
        return HttpConnection(endpoint)

    def _drop_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _give_back(self, connection: HttpConnection, *, keep: bool) -> None:
        if not keep or self._closed.is_set():
            connection.close()
        elif not connection.closed:
            self._idle.append(connection)

    def _advice(self, error: OSError) -> str:
        if isinstance(error, StatusError):
            return advice_for_status(error.reply.status, self._origin.scheme)
        return advice_for_error(error, f"{self._origin.host}:{self._origin.port}")

    def _refuse(self, error: OSError | ValueError) -> NoReturn:
        """Turns the failure of an open into a sentence."""
        if not isinstance(error, OSError):
            raise SourceError(f"{error}: check the URL", source=self._label) from error
        number = error.errno if (error.errno or 0) > 0 else None
        raise SourceError(
            f"{_words(error)}: {self._advice(error)}", source=self._label, errno=number
        ) from error


def redirect_target(source: Target, location: str) -> Target:
    """Where a ``Location`` header leads from ``source``.

    Raises:
        BadReplyError: not to an http or https URL.
    """
    try:
        return Target.parse(urllib.parse.urljoin(source.url, location))
    except ValueError as error:
        raise BadReplyError(f"the server redirects to a place that is none ({error})") from None


def content_range(reply: Reply) -> tuple[int | None, int | None, int | None]:
    """First and last byte and total size of a ``Content-Range``; None where it does not say.

    >>> content_range(Reply(416, "", {"content-range": "bytes */12"}))
    (None, None, 12)
    """
    value = reply.headers.get("content-range", "")
    match = re.fullmatch(r"bytes (?:([0-9]+)-([0-9]+)|\*)/([0-9]+|\*)", value)
    if match is None:
        return None, None, None
    first, last, total = match.groups()
    return (
        None if first is None else int(first),
        None if last is None else int(last),
        None if total == "*" else int(total),
    )


def _may_pass(error: OSError) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, StatusError):
        return error.reply.status in TRANSIENT
    if isinstance(error, BadReplyError):
        return False
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    return type(error).__name__ != "SSLCertVerificationError" and error.errno != errno.EBADF


def _words(error: OSError) -> str:
    """The failure in words, without the number."""
    if isinstance(error, StatusError):
        excerpt = error.reply.excerpt.decode("utf-8", "replace")
        said = re.search(r"<Message>([^<]{1,200})", excerpt)
        return f"{error.strerror} ({said.group(1)})" if said else str(error.strerror)
    return error.strerror or str(error)

"""Objects in S3, Google Cloud Storage and Azure, read by obstore; and the way to http sources.

`recipe` is the one door for every URL scheme here. http:// and https:// go to
`quire.store.http_store`, which reads straight into the page's memory; the clouds go to obstore,
which knows their signatures and credential chains. obstore's synchronous calls are made from the
pager's worker threads: measured at 16 requests in flight, they take half the time of its
asynchronous ones (0.3 against 0.6 ms at 64 KiB), whose every step wakes the event loop.

Size, ETag and Last-Modified are pinned at open. Each read carries ``If-Match`` (or
``If-Unmodified-Since``), and what the reply says of the object is compared too, since some servers
ignore conditions: an object that changes raises, and versions are never mixed.
"""

from __future__ import annotations

import errno
import importlib.util
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.errors import ChangedError, Error, PageIOError, SourceError, TruncatedError
from quire.store.abc import Store
from quire.store.cloud_options import FAMILIES, CloudOptions
from quire.store.http_options import HttpOptions
from quire.store.http_store import ERRNO_OF_STATUS, HttpRecipe
from quire.store.remote_advice import advice_for_status

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from obstore import GetOptions

    from quire.pager.recipe import Recipe

__all__ = ["SCHEMES", "CloudRecipe", "CloudStore", "recipe"]

SCHEMES = frozenset({"http", "https", *FAMILIES})


def recipe(url: str, storage_options: Mapping[str, object] | None = None) -> Recipe:
    """What opens ``url`` in the pager process. Nothing is asked of the network here.

    ``storage_options`` are obstore's or fsspec's: see `quire.store.http_options` and
    `quire.store.cloud_options`.

    Raises:
        quire.SourceError: a bad URL or option, or obstore is not installed.

    >>> recipe("s3://bucket/data/x.npy", {"anon": True}).label
    's3://bucket/data/x.npy'
    """
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return HttpRecipe(url, HttpOptions.from_storage_options(storage_options))
    if scheme not in FAMILIES:
        raise SourceError(
            f"{scheme}:// is none of {', '.join(sorted(SCHEMES))}: check the URL", source=url
        )
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket or not key:
        raise SourceError(
            f"the URL names no object: write {scheme}://BUCKET/PATH/TO/OBJECT", source=url
        )
    if importlib.util.find_spec("obstore") is None:
        raise SourceError(
            f"{scheme}:// sources are read by obstore, which is not installed: run "
            "`pip install 'quire[remote]'`",
            source=url,
        )
    options = CloudOptions.from_storage_options(FAMILIES[scheme], storage_options)
    return CloudRecipe(scheme, bucket, key, options)


@dataclass(frozen=True)
class CloudRecipe:
    """Opens `CloudStore` in the pager process."""

    scheme: str
    bucket: str
    key: str
    options: CloudOptions = field(repr=False)

    @property
    def label(self) -> str:
        """The URL."""
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def open(self) -> CloudStore:
        """Asks for the object's first byte and pins what the answer says of it.

        Raises:
            quire.SourceError: no answer, a refusal, no such object, or no range requests.
        """
        return CloudStore(self)


@dataclass(frozen=True)
class Pin:
    """What was true of the object at open."""

    size: int
    etag: str | None
    modified: datetime | None

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Pin:
        """The pin of obstore's ``ObjectMeta``."""
        return cls(meta["size"], meta.get("e_tag"), meta.get("last_modified"))

    @property
    def condition(self) -> GetOptions:
        """Obstore's ``GetOptions`` that ask the server to refuse a changed object."""
        if self.etag is not None and not self.etag.startswith("W/"):
            return {"if_match": self.etag}
        return {"if_unmodified_since": self.modified} if self.modified else {}

    def difference(self, now: Pin) -> str | None:
        """What tells ``now`` from this version, in words, or None."""
        if self.etag and now.etag:
            if self.etag != now.etag:
                return f"its ETag was {self.etag}, now it is {now.etag}"
        elif self.modified != now.modified:
            return f"it was last modified {self.modified}, now {now.modified}"
        if self.size != now.size:
            return f"it had {self.size} bytes, now it has {now.size}"
        return None


class CloudStore(Store):
    """One object of a bucket; reads may come from any thread."""

    def __init__(self, source: CloudRecipe) -> None:
        """Opens the object; see `CloudRecipe.open`."""
        import obstore

        self._get = obstore.get
        self._label = source.label
        self._key = source.key
        self._options = source.options
        self.kind = source.options.family
        try:
            self._bucket = source.options.connect(source.bucket)
            self._pin = self._probe(obstore)
        except Error as error:
            error.source = error.source or self._label
            raise
        except Exception as error:
            failure = Failure.of(error, self.kind)
            raise SourceError(
                f"{failure.words}: {failure.advice}", source=self._label, errno=failure.errno
            ) from error

    @property
    def size(self) -> int:
        """Bytes of the object."""
        return self._pin.size

    @property
    def label(self) -> str:
        """The URL."""
        return self._label

    @property
    def version(self) -> str | None:
        """The pinned ETag, else the time of the last modification."""
        modified = self._pin.modified
        return self._pin.etag or (modified.isoformat() if modified else None)

    @property
    def details(self) -> dict[str, object]:
        """What `quire info` shows of the server's answer."""
        return {"etag": self._pin.etag, "last_modified": str(self._pin.modified)}

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from ``offset`` by one range request; obstore retries.

        Raises:
            quire.ChangedError: the object is no longer the one that was opened.
            quire.TruncatedError: the answer is shorter than what was asked for.
            quire.PageIOError: any other failure, with errno.
        """
        if not len(buffer):
            return
        wanted = (offset, offset + len(buffer))
        try:
            options: GetOptions = {"range": wanted, **self._pin.condition}
            result = self._get(self._bucket, self._key, options=options)
            self._check(Pin.of(result.meta), offset)
            data = memoryview(result.bytes())
        except Error:
            raise
        except Exception as error:
            raise self._read_error(error, offset) from error
        if tuple(result.range) != wanted or len(data) != len(buffer):
            raise TruncatedError(
                f"the server gave {len(data)} of {len(buffer)} bytes: see whether the object, or "
                "what stands between, was cut short",
                source=self._label,
                offset=offset,
            )
        buffer[:] = data

    def close(self) -> None:
        """Nothing to do: obstore closes its connections with the process."""

    def _probe(self, obstore: Any) -> Pin:
        """The object's facts, from a request for its first byte: it shows that ranges work."""
        try:
            result = self._get(self._bucket, self._key, options={"range": (0, 1)})
            result.bytes()
        except Exception as error:
            if Failure.of(error, self.kind).status != 416:
                raise
            pin = Pin.of(obstore.head(self._bucket, self._key))
            if pin.size:
                raise
            return pin
        if tuple(result.range) != (0, 1):
            raise SourceError(
                f"the server gives bytes {result.range} when asked for the first one: it has no "
                "range requests; download the object and open the copy",
                source=self._label,
            )
        return Pin.of(result.meta)

    def _check(self, now: Pin, offset: int) -> None:
        difference = self._pin.difference(now)
        if difference is not None:
            raise self._changed(difference, offset)

    def _changed(self, difference: str, offset: int) -> ChangedError:
        return ChangedError(
            f"the object changed while it was mapped ({difference}): close the mapping and open "
            "it again",
            source=self._label,
            offset=offset,
        )

    def _read_error(self, error: Exception, offset: int) -> Error:
        failure = Failure.of(error, self.kind)
        if failure.status == 412 or type(error).__name__ == "PreconditionError":
            return self._changed("the server says that its ETag is another", offset)
        kind = TruncatedError if failure.is_short else PageIOError
        return kind(
            f"{failure.words}: {failure.advice}",
            source=self._label,
            offset=offset,
            errno=failure.errno,
        )


@dataclass(frozen=True)
class Failure:
    """An obstore exception read: its text is all it has (obstore 0.12)."""

    words: str
    advice: str
    status: int | None = None
    errno: int | None = None
    is_short: bool = False

    @classmethod
    def of(cls, error: Exception, family: str) -> Failure:
        """Finds status, errno and the server's words in ``error``."""
        text = str(error)
        first = text.partition("\n")[0]
        status = re.search(r"status code: (\d+) ?([A-Za-z ]*)", text)
        said = re.search(r"<Message>([^<]{1,200})", text)
        os_error = re.search(r"code: (\d+),\s+kind: (\w+)", text)
        if status is not None:
            code = int(status.group(1))
            words = f"the server answered {code} {status.group(2)}".rstrip()
            words += f" ({said.group(1)})" if said else ""
            return cls(words, advice_for_status(code, family), code, errno_of_status(code))
        if isinstance(error, FileNotFoundError):
            return cls(first[:200], advice_for_status(404, family), 404, errno.ENOENT)
        if "169.254.169.254" in text or "metadata" in first.lower():
            return cls("no credentials were found", advice_for_status(403, family), 403, 13)
        if os_error is not None:
            number = int(os_error.group(1))
            words = re.sub(r"([a-z])([A-Z])", r"\1 \2", os_error.group(2)).lower()
            return cls(words, "check the endpoint and the network", None, number)
        return cls.of_text(text, first)

    @classmethod
    def of_text(cls, text: str, first: str) -> Failure:
        """What can be said of an exception with neither a status nor an errno."""
        if "non-partial response" in first or "NotPartial" in text:
            return cls(
                "the server has no range requests, so single pages cannot be fetched",
                "download the object and open the copy",
                errno=errno.EIO,
            )
        if "BadScheme" in text:
            return cls("the endpoint is http://, not https://", "pass allow_http=True")
        if "TimedOut" in text:
            return cls(
                "the server did not answer in time",
                "check the network, or pass a longer timeout=",
                errno=errno.ETIMEDOUT,
            )
        if "UnexpectedEof" in text or "IncompleteBody" in text or "IncompleteMessage" in text:
            return cls(
                "the server's answer ended early",
                "see whether what stands between cut it short, then try again",
                is_short=True,
            )
        if "certificate" in text.lower() or "UnknownIssuer" in text:
            return cls(
                "the endpoint's certificate is not trusted",
                "give its authority by root_certificate= (PEM text), or for a test server pass "
                "allow_invalid_certificates=True",
            )
        if "dns error" in text or "failed to lookup" in text:
            return cls("the endpoint's name is not known", "check its spelling and the network")
        return cls(first[:300], "check the storage_options and the server")


def errno_of_status(status: int) -> int:
    """The error number nearest in meaning to an HTTP status."""
    return ERRNO_OF_STATUS.get(status, errno.EIO)

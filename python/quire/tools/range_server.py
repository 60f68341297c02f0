"""A small HTTP/1.1 server of the files in one directory, with range requests.

The demo, the benchmarks and the tests read remote arrays from it, so it has what a mapping needs
of a server: ``Range`` (one range; several are answered with the whole file, as RFC 9110 allows),
strong ``ETag`` and ``Last-Modified``, the conditions ``If-Match``, ``If-Unmodified-Since`` and
``If-Range``, connections that stay open, and bodies sent by ``sendfile(2)``. One thread serves
one connection. It is made for this machine and trusted clients: it listens on 127.0.0.1 unless
told otherwise, has no access control, and refuses whatever lies outside its directory.

A thread that touches a mapped page holds the interpreter lock while it waits, so a server in the
same process could never answer it. :class:`RangeServer` therefore runs as its own process; the
command ``python -m quire.tools.range_server DIRECTORY`` is the same server.
"""

from __future__ import annotations

import argparse
import email.utils
import os
import select
import socket
import socketserver
import ssl
import stat
import subprocess
import sys
import threading
import urllib.parse
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["FileServer", "RangeServer", "Request", "Response"]

LINE_BYTES_MAX = 65_536
HEADERS_MAX = 100
OPEN_FILES_MAX = 64
COPY_BYTES = 262_144
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Request:
    """One parsed request; header names are lower-case."""

    method: str
    path: str
    headers: dict[str, str]


class ServedFile:
    """An open file and the headers of its version; closed when the last answer has dropped it."""

    def __init__(self, path: str) -> None:
        """Opens ``path``.

        Raises:
            OSError: it cannot be opened, or is not a regular file.
        """
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        info = os.fstat(self.fd)
        if not stat.S_ISREG(info.st_mode):
            raise FileNotFoundError(path)
        self.identity = identity_of(info)
        self.size = info.st_size
        self.mtime_s = int(info.st_mtime)
        self.etag = f'"{info.st_ino:x}-{info.st_size:x}-{info.st_mtime_ns:x}"'
        self.headers = {
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "ETag": self.etag,
            "Last-Modified": email.utils.formatdate(info.st_mtime, usegmt=True),
        }

    def __del__(self) -> None:
        """Closes the descriptor."""
        if hasattr(self, "fd"):
            os.close(self.fd)


@dataclass
class Response:
    """What to send: ``body``, or ``count`` bytes at ``offset`` of ``file``."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: ServedFile | None = None
    offset: int = 0
    count: int = 0

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return len(self.body) if self.file is None else self.count


class BadRequestError(Exception):
    """The bytes received are not a request this server understands."""


def identity_of(info: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one version of a file from another."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def parse_range(value: str, size: int) -> tuple[int, int] | None:
    """The ``(start, stop)`` that a ``Range`` header asks of a body of ``size`` bytes.

    Returns None where the header is to be ignored: another unit, several ranges, bad syntax.

    Raises:
        ValueError: the range is well-formed but lies outside the body (status 416).

    >>> parse_range("bytes=0-99", 1000), parse_range("bytes=-10", 1000), parse_range("x=1", 1000)
    ((0, 100), (990, 1000), None)
    """
    unit, _, spec = value.partition("=")
    first, dash, last = spec.strip().partition("-")
    if unit.strip() != "bytes" or not dash or "," in spec:
        return None
    if not (first or last) or not (first + last).isascii() or not (first + last).isdigit():
        return None
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < start:
            return None
    if start >= stop:
        raise ValueError(f"range {value} is outside a body of {size} bytes")
    return start, stop


def condition_holds(request: Request, etag: str, mtime_s: int) -> bool:
    """Whether the request's ``If-Match`` or ``If-Unmodified-Since`` allows an answer."""
    wanted = request.headers.get("if-match")
    if wanted is not None:
        return wanted.strip() == "*" or etag in (tag.strip() for tag in wanted.split(","))
    since = request.headers.get("if-unmodified-since")
    if since is not None:
        try:
            return mtime_s <= email.utils.parsedate_to_datetime(since).timestamp()
        except ValueError:
            return True
    return True


class Connection(socketserver.BaseRequestHandler):
    """One client connection: requests are answered one after the other until it closes."""

    server: FileServer
    request: socket.socket

    def handle(self) -> None:
        """Serves the connection; a client that goes away ends it silently."""
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = bytearray()
        try:
            while (request := self.read_request()) is not None:
                self.server.send(self.request, request, self.server.respond(request))
                if request.headers.get("connection", "").lower() == "close":
                    return
        except BadRequestError as error:
            body = f"{error}\n".encode()
            head = f"HTTP/1.1 400 Bad Request\r\nContent-Length: {len(body)}\r\nConnection: close"
            self.request.sendall(head.encode() + b"\r\n\r\n" + body)
        except OSError:
            return

    def read_request(self) -> Request | None:
        """The next request, or None where the client has closed the connection."""
        while (end := self.received.find(b"\r\n\r\n")) < 0:
            if len(self.received) > LINE_BYTES_MAX:
                raise BadRequestError("the header is too long")
            more = self.request.recv(LINE_BYTES_MAX)
            if not more:
                return None
            self.received += more
            if not self.received[:1].isalpha():
                raise BadRequestError("not HTTP; is this a TLS client at a plain port?")
        lines = self.received[:end].decode("latin-1").split("\r\n")
        del self.received[: end + 4]
        words = lines[0].split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or len(lines) > HEADERS_MAX:
            raise BadRequestError("not an HTTP/1.1 request")
        headers = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon:
                raise BadRequestError("a header line has no colon")
            headers[name.lower()] = value.strip()
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            raise BadRequestError("a request with a body is not served")
        path = urllib.parse.unquote(words[1].partition("?")[0])
        return Request(words[0], path, headers)


class FileServer(socketserver.ThreadingTCPServer):
    """Serves the files under ``directory``; subclasses may change ``respond`` and ``send``.

    Threads: ``respond`` and ``send`` are called by several connection threads at once.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, directory: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listens on ``host:port`` (port 0: any free one); ``serve_forever`` does the work."""
        self.directory = str(directory.resolve(strict=True)).rstrip(os.sep)
        self._opened: dict[str, ServedFile] = {}
        super().__init__((host, port), Connection)

    @property
    def url(self) -> str:
        """Where the directory is served, without a slash at the end."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{host}:{port}"

    def respond(self, request: Request) -> Response:
        """The answer to one request."""
        if request.method not in ("GET", "HEAD"):
            return refusal(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})
        try:
            file = self.file_at(request.path)
        except PermissionError:
            return refusal(HTTPStatus.FORBIDDEN)
        except (OSError, ValueError):
            return refusal(HTTPStatus.NOT_FOUND)
        return self.file_response(request, file)

    def file_at(self, path: str) -> ServedFile:
        """The file that a request's path names, kept open while it is the same version.

        Raises:
            PermissionError: it lies outside the directory, by ``..`` or by a link.
            OSError, ValueError: there is no such file.
        """
        full = os.path.normpath(self.directory + path)
        file = self._opened.get(full)
        if file is not None and identity_of(Path(full).stat()) == file.identity:
            return file
        file = ServedFile(full)
        where = Path(f"/proc/self/fd/{file.fd}").readlink()
        if not where.is_relative_to(self.directory or os.sep):
            raise PermissionError(full)
        if len(self._opened) >= OPEN_FILES_MAX:
            self._opened.clear()
        self._opened[full] = file
        return file

    def file_response(self, request: Request, file: ServedFile) -> Response:
        """The answer to a request for ``file``, with its conditions and range."""
        if not condition_holds(request, file.etag, file.mtime_s):
            return refusal(HTTPStatus.PRECONDITION_FAILED, file.headers)
        wanted = request.headers.get("range")
        if request.headers.get("if-range", file.etag) not in (
            file.etag,
            file.headers["Last-Modified"],
        ):
            wanted = None
        try:
            window = parse_range(wanted, file.size) if wanted else None
        except ValueError:
            return refusal(
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                {"Content-Range": f"bytes */{file.size}"},
            )
        if window is None:
            return Response(HTTPStatus.OK, file.headers, file=file, count=file.size)
        start, stop = window
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{file.size}", **file.headers}
        return Response(
            HTTPStatus.PARTIAL_CONTENT, headers, file=file, offset=start, count=stop - start
        )

    def send(self, client: socket.socket, request: Request, response: Response) -> None:
        """Sends one answer; raises OSError where the client is gone."""
        status = HTTPStatus(response.status)
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Length: {response.length}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        if request.method == "HEAD":
            client.sendall(head)
        elif response.file is None:
            client.sendall(head + response.body)
        else:
            more = response.count and not isinstance(client, ssl.SSLSocket)
            client.sendall(head, socket.MSG_MORE if more else 0)
            send_file(client, response.file.fd, response.offset, response.count)


def refusal(status: HTTPStatus, headers: dict[str, str] | None = None) -> Response:
    """An answer whose body is the status in words."""
    return Response(status, headers or {}, body=f"{status.value} {status.phrase}\n".encode())


def send_file(client: socket.socket, fd: int, offset: int, count: int) -> None:
    """Sends ``count`` bytes at ``offset``; a file that has become shorter ends the connection."""
    while count:
        if isinstance(client, ssl.SSLSocket):
            data = os.pread(fd, min(count, COPY_BYTES), offset)
            client.sendall(data)
            sent = len(data)
        else:
            sent = os.sendfile(client.fileno(), fd, offset, count)
        if sent == 0:
            raise ConnectionAbortedError("the file became shorter while it was sent")
        offset += sent
        count -= sent


class RangeServer:
    """The server as a process of its own, alive inside a ``with`` block or until ``stop()``.

    ``command`` replaces the program that is started; it must print its URL as its first line
    and end when its standard input closes, as this module's own command does.

    >>> import tempfile, urllib.request
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "x.bin").write_bytes(b"0123456789")
    ...     with RangeServer(folder) as server:
    ...         wanted = urllib.request.Request(server.url + "/x.bin")
    ...         wanted.add_header("Range", "bytes=2-4")
    ...         urllib.request.urlopen(wanted).read()
    b'234'
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        command: list[str] | None = None,
    ) -> None:
        """Starts the process and waits until it listens.

        Raises:
            RuntimeError: the process ended, or did not listen within 30 s.
        """
        own = [sys.executable, "-m", "quire.tools.range_server", os.fspath(directory)]
        self.process = subprocess.Popen(
            command or own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = self._wait_url()

    def _wait_url(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_TIMEOUT_S)
        url = self.process.stdout.readline().strip() if ready else ""
        if not url:
            self.stop()
            raise RuntimeError(
                "the range server did not start: run "
                f"`{' '.join(map(str, self.process.args))}` to see why"  # type: ignore[arg-type]
            )
        return url

    def stop(self) -> None:
        """Ends the process and waits for its end; calling it again does nothing."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> RangeServer:
        """The running server."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the process."""
        self.stop()


def serve_until_input_closes(server: FileServer) -> None:
    """Prints the server's URL and serves until standard input reaches its end.

    So a server whose parent dies, in whatever way, ends too.
    """
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.url, flush=True)
    while os.read(0, 4096):
        pass


def main(arguments: list[str] | None = None) -> int:
    """The command ``python -m quire.tools.range_server``."""
    parser = argparse.ArgumentParser(
        prog="python -m quire.tools.range_server",
        description="Serve the files of a directory over HTTP with range requests, until "
        "standard input closes.",
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 (the default): any free port")
    options = parser.parse_args(arguments)
    with FileServer(options.directory, options.host, options.port) as server:
        try:
            serve_until_input_closes(server)
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A web server of static files that are mapped: `python file_server.py FOLDER [PORT]`.

What is sent goes from the page cache to the socket, as a view of the mapping: nothing is read into
Python objects. Range requests are slices. A file that is cut short while it is being served would
end a server over `mmap` with SIGBUS; here the client gets a 503, or, when the answer had begun, a
closed connection, and everybody else is served as before.
"""

from __future__ import annotations

import errno
import functools
import http.client
import mimetypes
import os
import re
import sys
import tempfile
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import quire

RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, *arguments: object) -> None:
        self.root = root.resolve()
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Sends a file, or a range of one; of a HEAD request, what would be said of it."""
        wanted = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        path = Path(self.root, wanted).resolve() if "\0" not in wanted else self.root
        if not path.is_relative_to(self.root) or not path.is_file():
            return self.send_error(404)
        try:
            mapping = quire.map(path, sharing="shared")
        except quire.Error as error:
            return self.send_error(503, explain=str(error))
        with mapping:
            return self._send(mapping, path)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, mapping: quire.KernelMapping, path: Path) -> None:
        size = len(mapping)
        part = self._range(size)
        if part is None:
            return self._head(416, path, 0, f"bytes */{size}")
        first, end = part
        if (error := cut_short(mapping)) is not None:
            return self.send_error(503, explain=str(error))
        whole = end - first == size
        said = None if whole else f"bytes {first}-{end - 1}/{size}"
        self._head(200 if whole else 206, path, end - first, said)
        try:
            with memoryview(mapping)[first : end if self.command == "GET" else first] as view:
                self.connection.sendall(view)
        except OSError as error:  # EFAULT: a page cannot be had
            self.close_connection = True  # fewer bytes than were promised: the client sees it
            if error.errno == errno.EFAULT:
                self.log_error("%s", cut_short(mapping) or error)
        return None

    def _range(self, size: int) -> tuple[int, int] | None:
        """First byte and end of what is asked for; None when it lies outside."""
        found = RANGE.fullmatch(self.headers.get("Range", "").strip())
        if found is None or found[0] == "bytes=-" or self.command != "GET":
            return 0, size  # none, or of a kind that is to be ignored (RFC 9110, 14.2)
        if not found[1]:
            return (max(size - int(found[2]), 0), size) if int(found[2]) else None
        first, last = int(found[1]), int(found[2] or size)
        if last < first:
            return 0, size
        return (first, min(last + 1, size)) if first < size else None

    def _head(self, status: int, path: Path, length: int, content_range: str | None = None) -> None:
        self.send_response(status)
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing of requests; errors go to `log_error`."""

    def log_error(self, text: str, *arguments: object) -> None:
        """Tells the operator."""
        print(text % arguments)


def cut_short(mapping: quire.KernelMapping) -> quire.Error | None:
    """Why the last byte cannot be had; None when it can."""
    try:
        mapping.read(max(len(mapping) - 1, 0))
    except quire.PageIOError as error:
        return error
    return None


def serve(root: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of the files below ``root``; call its `serve_forever`."""
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, root))


def main() -> None:
    """Serves a file, cuts it short in the middle of an answer, and serves another."""
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        large, small = Path(folder, "large.bin"), Path(folder, "small.txt")
        large.write_bytes(os.urandom(1 << 20) * 64)
        small.write_text("virtual memory")
        client = http.client.HTTPConnection(*server.server_address[:2])
        client.request("GET", "/small.txt", headers={"Range": "bytes=8-"})
        answer = client.getresponse()
        print(answer.status, answer.headers["Content-Range"], answer.read().decode())
        client.request("GET", "/large.bin")
        answer = client.getresponse()
        answer.read(1000)
        os.truncate(large, 4096)  # the server waits with the rest: it fits no socket buffer
        try:
            answer.read()
        except (http.client.IncompleteRead, ConnectionError) as error:
            print(f"the client: {type(error).__name__}")
        client.close()
        client.request("GET", "/small.txt")
        print("the server goes on:", client.getresponse().read().decode())
        client.close()
        server.shutdown()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8000).serve_forever()
    main()

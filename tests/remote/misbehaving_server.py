"""A range server that can be told to misbehave, as a process of its own.

``Misbehaving.behave(kind, ...)`` changes what the following requests meet; ``requests()`` lists
what clients asked for. The orders travel as ordinary GETs of paths that begin with ``/__``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import ssl
import struct
import sys
import threading
import urllib.parse
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import Any

from quire.tools.range_server import (
    FileServer,
    RangeServer,
    Request,
    Response,
    refusal,
    serve_until_input_closes,
)


class MisbehavingServer(FileServer):
    """The server process's side."""

    def __init__(self, directory: Path, certificate: str | None = None) -> None:
        super().__init__(directory)
        self.guard = threading.Lock()
        self.behaviour: dict[str, Any] = {}
        self.log: list[dict[str, Any]] = []
        self.released = threading.Event()
        self.certificate = certificate
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    @property
    def url(self) -> str:
        return super().url.replace("http:", "https:") if self.certificate else super().url

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is what many of the tests are about."""

    def respond(self, request: Request) -> Response:
        if request.path.startswith("/__"):
            return self.order(request.path)
        with self.guard:
            self.log.append({"path": request.path, "headers": request.headers})
            kind = self.take_turn()
        if kind == "status":
            headers = {"Retry-After": "0"} if self.behaviour.get("retry_after") else {}
            return refusal(HTTPStatus(self.behaviour["status"]), headers)
        if kind == "redirect":
            return Response(302, {"Location": self.behaviour["to"]})
        return self.bent(request, kind)

    def bent(self, request: Request, kind: str) -> Response:
        """An answer with its conditions, range or headers falsified."""
        dropped = {
            "ignore_range": ("range",),
            "ignore_condition": ("if-match", "if-unmodified-since"),
        }.get(kind, ())
        headers = {k: v for k, v in request.headers.items() if k not in dropped}
        answer = super().respond(Request(request.method, request.path, headers))
        answer.headers = dict(answer.headers)
        if kind == "etag":
            answer.headers["ETag"] = self.behaviour["value"]
        elif kind == "headers":
            for name, value in self.behaviour["set"].items():
                answer.headers.pop(name, None)
                if value is not None:
                    answer.headers[name] = value
        return answer

    def send(self, client: socket.socket, request: Request, response: Response) -> None:
        kind = self.behaviour.get("sending", "")
        if request.path.startswith("/__") or not kind:
            return super().send(client, request, response)
        with self.guard:
            if not self.take_sending_turn():
                kind = ""
        if kind == "drop":
            raise ConnectionAbortedError
        if kind == "stall":
            self.released.wait()
        if kind == "truncate":
            return self.send_part(client, response)
        if kind == "chunked":
            return send_chunked(client, response)
        if kind == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionAbortedError
        super().send(client, request, response)
        if kind == "close_after":
            raise ConnectionAbortedError
        return None

    def send_part(self, client: socket.socket, response: Response) -> None:
        """Announces the whole body, sends ``bytes`` of it, and hangs up."""
        lines = [f"HTTP/1.1 {response.status} X", f"Content-Length: {response.length}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        client.sendall(body_of(response)[: self.behaviour["bytes"]])
        raise ConnectionAbortedError

    def take_turn(self) -> str:
        """The behaviour of this request; ``count`` requests have it, or all."""
        left = self.behaviour.get("count")
        if left is None:
            return str(self.behaviour.get("kind", ""))
        self.behaviour["count"] = left - 1
        return str(self.behaviour["kind"]) if left > 0 else ""

    def take_sending_turn(self) -> bool:
        left = self.behaviour.get("sendings")
        if left is None:
            return True
        self.behaviour["sendings"] = left - 1
        return bool(left > 0)

    def order(self, path: str) -> Response:
        """Carries out an order of the test."""
        name, _, rest = path[3:].partition("/")
        with self.guard:
            if name == "behave":
                self.released.set()
                self.released = threading.Event()
                self.behaviour = json.loads(urllib.parse.unquote(rest))
                self.log.clear()
            return Response(200, {}, json.dumps(self.log).encode())


class Misbehaving(RangeServer):
    """The test's side."""

    def __init__(self, directory: Path, certificate: Path | None = None) -> None:
        words = [sys.executable, os.fspath(Path(__file__)), os.fspath(directory)]
        self.trust = ssl.create_default_context(cafile=certificate) if certificate else None
        super().__init__(
            directory,
            command=[*words, "--certificate", os.fspath(certificate)] if certificate else words,
        )

    def behave(self, kind: str = "", **details: Any) -> None:
        """Changes what the following requests meet; without a kind, good behaviour."""
        self._order("behave/" + urllib.parse.quote(json.dumps({"kind": kind, **details}), safe=""))

    def requests(self) -> list[dict[str, Any]]:
        """The requests since the last order, oldest first."""
        requests: list[dict[str, Any]] = json.loads(self._order("log"))
        return requests

    def _order(self, order: str) -> bytes:
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.trust)
        )
        with opener.open(f"{self.url}/__{order}") as answer:
            body: bytes = answer.read()
        return body


def body_of(response: Response) -> bytes:
    """The bytes of an answer."""
    if response.file is None:
        return response.body
    return os.pread(response.file.fd, response.count, response.offset)


def send_chunked(client: socket.socket, response: Response) -> None:
    """The same answer in chunks of an odd length, after an early hint."""
    client.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    lines = [f"HTTP/1.1 {response.status} X", "Transfer-Encoding: chunked"]
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    client.sendall("\r\n".join([*lines, "", ""]).encode())
    body = body_of(response)
    for start in range(0, len(body), 1237):
        part = body[start : start + 1237]
        client.sendall(b"%x;ext=1\r\n%b\r\n" % (len(part), part))
    client.sendall(b"0\r\nTrailer: x\r\n\r\n")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--certificate")
    options = parser.parse_args()
    with MisbehavingServer(options.directory, options.certificate) as server:
        serve_until_input_closes(server)
    return 0


if __name__ == "__main__":
    sys.exit(main())

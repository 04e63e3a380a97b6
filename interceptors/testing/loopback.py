"""An HTTP server on loopback, in a thread, that a function answers for, and that can hang up on its clients."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Answer:
    """What a request is answered."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(status: int, content: Mapping[str, Any]) -> Answer:
    """An answer in JSON."""
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    return Answer(status, json.dumps(content).encode(), headers)


def oauth_error(status: int, error: str) -> Answer:
    """An error as OAuth has it (RFC 6749 section 5.2)."""
    return json_answer(status, {"error": error})


class LoopbackServer(ThreadingMixIn, TCPServer):
    """Gives each connection a thread; serves once `serve_forever` runs.

    Args:
        handle: Answers a request: its method, target, body and `Authorization`.
        port: 0 for a free one.
    """

    # Not http.server's, which looks its own name up in the DNS.
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, handle: Callable[[str, str, bytes, str | None], Answer], port: int) -> None:
        self.handle = handle
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts a connection."""
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Breaks the connections that clients keep alive."""
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are none of our business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        server = cast("LoopbackServer", self.server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = server.handle(self.command, self.path, body, self.headers.get("Authorization"))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = _answer  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
        """Tests have output enough."""

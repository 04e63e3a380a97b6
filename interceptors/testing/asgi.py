"""ASGI adapters for the fake server: by path, to a WSGI application, and around what Hypercorn does to streams."""

from __future__ import annotations

import asyncio
import queue
import re
import sys
from concurrent.futures import Future
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, cast

_GRPC: Final = re.compile(r"application/grpc($|[+;])")

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = Mapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def routed(applications: Mapping[str, Application]) -> Application:
    """Hands each request to the application with the longest path that its own begins with."""

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            # A handshake that is not accepted is answered with 403.
            await send({"type": "websocket.close"})
            return
        for path, application in applications.items():
            if scope["path"].startswith(f"{path}/"):
                await application(scope, receive, send)
                return
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return route


def drained(application: Application) -> Application:
    """Takes in what a client still sends when it has been answered already, as a refused client stream does.

    Hypercorn forgets a stream when its response ends, and breaks the whole connection when more of the request comes.
    So it is never told: the client gets the end beneath ASGI, and Hypercorn hears of it when the request has ended too.
    """
    from hypercorn.protocol.events import EndBody

    async def drain(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        # ASGI has no way to end a response and still listen: `send` is a method of Hypercorn's stream.
        stream: Any = cast("Any", send).__self__
        received = has_trailers = False

        async def receiving() -> Message:
            nonlocal received
            message = await receive()
            received = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            nonlocal has_trailers
            if message["type"] == "http.response.start":
                has_trailers = message.get("trailers", False)
            elif message["type"] == "http.response.trailers":
                message = {**message, "more_trailers": True}
            elif not has_trailers and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await stream.send(EndBody(stream.stream_id))
                return
            await send(message)

        # Without it Hypercorn would send no trailers; over HTTP/1.1 there are none.
        scope["headers"] = [*(pair for pair in scope["headers"] if pair[0] != b"te"), (b"te", b"trailers")]
        await application(scope, receiving, sending)
        while not received:
            await receiving()
        if has_trailers and not stream.closed:
            # Trailers are an end by themselves, but leave a buffer behind, of which a connection may have 1,000.
            await stream.send(EndBody(stream.stream_id))

    return drain


class Running:
    """Knows the calls that an application is serving, so that they can be cancelled.

    Args:
        application: What serves them.
    """

    def __init__(self, application: Application) -> None:
        self._application = application
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - it is ASGI's
        task = asyncio.current_task()
        if task is not None and scope["type"] != "lifespan":
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await self._application(scope, receive, send)

    async def cancel(self) -> None:
        """Cancels them all, and waits until they have ended: a second at most."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)


client_gone: Final[ContextVar[Future[None]]] = ContextVar("client_gone")
"""Within a call to a WSGI application, which cannot ask: done once the client has hung up."""


class WsgiBridge:
    """A WSGI application as an ASGI one, each call on a thread, with request and response streamed.

    Args:
        application: The WSGI application.
        root: The path that it is served under.
    """

    def __init__(self, application: Callable[[dict[str, Any], Any], Any], root: str) -> None:
        self._application = application
        self._root = root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - it is ASGI's
        loop = asyncio.get_running_loop()
        gone: Future[None] = Future()
        client_gone.set(gone)
        body = _Body(gone)

        async def sending(message: Message) -> None:
            # Hypercorn would wait for ever for a client that is gone, and the thread with it.
            if not gone.done():
                await send(message)

        response = _Response(lambda message: asyncio.run_coroutine_threadsafe(sending(message), loop).result())
        feeding = asyncio.create_task(body.feed(receive))
        try:
            await asyncio.to_thread(self._run, self._environ(scope, body, response), response)
        finally:
            feeding.cancel()

    def _run(self, environ: dict[str, Any], response: _Response) -> None:
        chunks = self._application(environ, response.start)
        try:
            for chunk in chunks:
                response.write(chunk)
            response.end()
        finally:
            if hasattr(chunks, "close"):
                chunks.close()

    def _environ(self, scope: Scope, body: _Body, response: _Response) -> dict[str, Any]:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": scope["method"],
            "SCRIPT_NAME": "",
            "PATH_INFO": scope["path"].removeprefix(self._root),
            "QUERY_STRING": scope["query_string"].decode("ascii"),
            "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
            "SERVER_NAME": scope["server"][0],
            "SERVER_PORT": str(scope["server"][1]),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": scope["scheme"],
            "wsgi.input": body,
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        if scope["http_version"] == "2":
            environ["wsgi.ext.http.send_trailers"] = response.trailers.extend
        for key, value in scope["headers"]:
            name = key.decode("latin-1").upper().replace("-", "_")
            name = name if name in {"CONTENT_TYPE", "CONTENT_LENGTH"} else f"HTTP_{name}"
            text = value.decode("latin-1")
            environ[name] = f"{environ[name]}, {text}" if name in environ else text
        return environ


class _Body:
    """The request's body, for a thread: each read returns what there is, as streams of messages need it.

    Args:
        gone: What is done when the client hangs up.
    """

    def __init__(self, gone: Future[None]) -> None:
        self._gone = gone
        self._chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._rest = b""
        self._ended = False

    async def feed(self, receive: Receive) -> None:
        try:
            while (message := await receive())["type"] == "http.request":
                if chunk := message.get("body", b""):
                    self._chunks.put(chunk)
                if not message.get("more_body", False):
                    self._chunks.put(b"")
        finally:
            # Now or never: who is told that the body ends looks whether it was cut short.
            self._gone.set_result(None)
            self._chunks.put(b"")

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; the rest of the body if it is negative; nothing at the body's end."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 16), b""))
        if not self._rest and not self._ended:
            self._rest = self._chunks.get()
            self._ended = not self._rest
        chunk, self._rest = self._rest[:size], self._rest[size:]
        return chunk


class _Response:
    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self._begin: dict[str, Any] | None = None
        self.trailers: list[tuple[str, str]] = []

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:  # noqa: ARG002
        self._begin = {
            "type": "http.response.start",
            "status": int(status.split(maxsplit=1)[0]),
            "headers": [(key.lower().encode(), value.encode("latin-1")) for key, value in headers],
            # Only gRPC has any.
            "trailers": any(key.lower() == "content-type" and _GRPC.match(value) for key, value in headers),
        }
        self._has_trailers = self._begin["trailers"]

    def write(self, chunk: bytes) -> None:
        self._started()
        self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    def end(self) -> None:
        self._started()
        self._send({"type": "http.response.body", "body": b"", "more_body": False})
        if self._has_trailers:
            trailers = [(key.encode(), value.encode()) for key, value in self.trailers]
            self._send({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})

    def _started(self) -> None:
        if self._begin is not None:
            self._send(self._begin)
            self._begin = None

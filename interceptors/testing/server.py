"""A real server on loopback with both services, that checks each token as a resource server does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from interceptors.gen.kontext.agent.v1 import event_pb2_grpc, heartbeat_pb2_grpc
from interceptors.testing.attempts import Attempt, Refused
from interceptors.testing.services import Services

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from interceptors.testing.connect import ConnectServer
    from interceptors.testing.issuer import FakeIssuer


_NOT_RUNNING: Final = "the fake server is not running: use it as a context manager"


class FakeServer(Services):
    """A server for tests: it verifies each token's signature and expiry, and records every executed request.

    Use it as a context manager; it serves gRPC at `target` when entered, and Connect from when its `url` is asked for.
    See `Services` for what it can be told and asked.

    Args:
        issuer: Whose tokens are good.
        verify: Instead of `issuer`: raises `TokenRefused` unless the token that it is called with is good.
        max_workers: How many calls are served at the same time.
    """

    def __init__(
        self,
        issuer: FakeIssuer | None = None,
        *,
        verify: Callable[[str], object] | None = None,
        max_workers: int = 64,
    ) -> None:
        if verify is None:
            if issuer is None:
                msg = "pass the FakeIssuer whose tokens are good, or verify="
                raise TypeError(msg)
            verify = issuer.verify
        super().__init__(verify)
        self._max_workers = max_workers
        self._server: grpc.Server | None = None
        self._port = 0
        self._connect: ConnectServer | None = None
        self._connect_port = 0
        self._starting = threading.Lock()

    def start(self) -> Self:
        """Starts to serve on a free port, which stays the same over a `stop`; a server that runs is left alone."""
        if self._server is not None:
            return self
        self.open_up()
        # Several servers must not share a port, which gRPC would allow.
        server = grpc.server(
            ThreadPoolExecutor(self._max_workers, thread_name_prefix="fake-server"), options=[("grpc.so_reuseport", 0)]
        )
        heartbeat_pb2_grpc.add_HeartbeatServiceServicer_to_server(_Heartbeats(self), server)
        event_pb2_grpc.add_EventServiceServicer_to_server(_Events(self), server)
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        server.start()
        self._server = server
        if self._connect_port:
            self._serve_connect()
        return self

    def stop(self) -> None:
        """Stops to serve; calls that are still running are ended."""
        self.close_down()
        server, self._server = self._server, None
        if server is not None:
            server.stop(None).wait()
        connect, self._connect = self._connect, None
        if connect is not None:
            connect.stop()

    @property
    def target(self) -> str:
        """What a gRPC channel connects to.

        Raises:
            RuntimeError: The server has not been started.
        """
        if not self._port:
            raise RuntimeError(_NOT_RUNNING)
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """What a Connect client connects to: all three protocols, HTTP/1.1 and HTTP/2 without TLS, an ASGI application.

        Raises:
            ImportError: The extra "testing" is not installed.
            RuntimeError: The server is not running.
        """
        self._serve_connect()
        return f"http://127.0.0.1:{self._connect_port}"

    @property
    def wsgi_url(self) -> str:
        """`url`, but what answers is a WSGI application."""
        from interceptors.testing.connect import WSGI_PATH

        return f"{self.url}{WSGI_PATH}"

    def _serve_connect(self) -> None:
        from interceptors.testing.connect import ConnectServer

        with self._starting:
            if self._connect is None:
                if self._server is None:
                    raise RuntimeError(_NOT_RUNNING)
                self._connect = ConnectServer(self, self._connect_port, self._max_workers)
                self._connect_port = self._connect.port

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _attempt(services: Services, method: str, context: grpc.ServicerContext) -> Attempt:
    remaining = context.time_remaining()
    attempt = Attempt(
        services,
        method,
        [(str(key), str(value)) for key, value in context.invocation_metadata()],
        # gRPC says "about 292 years" for no deadline.
        remaining if remaining is not None and remaining < 10**9 else None,
    )
    if not context.add_callback(attempt.hang_up):
        attempt.hang_up()
    return attempt


def _abort(context: grpc.ServicerContext, refused: Refused) -> None:
    context.abort(grpc.StatusCode[refused.code], str(refused))


class _Heartbeats(heartbeat_pb2_grpc.HeartbeatServiceServicer):
    def __init__(self, services: Services) -> None:
        self._services = services

    def Heartbeat(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's names, here and below
        return _unary(self._services, "Heartbeat", self._services.heartbeat, request, context)

    def GetSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        return _unary(self._services, "GetSession", self._services.session, request, context)

    def WatchSession(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        try:
            yield from _attempt(self._services, "WatchSession", context).watch(request)
        except Refused as refused:
            _abort(context, refused)


class _Events(event_pb2_grpc.EventServiceServicer):
    def __init__(self, services: Services) -> None:
        self._services = services

    def ProcessHookEvent(self, request: Any, context: Any) -> Any:  # noqa: N802
        return _unary(self._services, "ProcessHookEvent", self._services.decision, request, context)

    def IngestEvents(self, request_iterator: Iterator[Any], context: Any) -> Any:  # noqa: N802
        try:
            return _attempt(self._services, "IngestEvents", context).ingest(request_iterator)
        except Refused as refused:
            _abort(context, refused)

    def StreamHookEvents(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        try:
            yield from _attempt(self._services, "StreamHookEvents", context).converse(request_iterator)
        except Refused as refused:
            _abort(context, refused)


def _unary(services: Services, method: str, answer: Callable[[Any], Any], request: Any, context: Any) -> Any:
    try:
        return _attempt(services, method, context).unary(request, answer)
    except Refused as refused:
        _abort(context, refused)

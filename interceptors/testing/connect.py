"""The fake services over Connect: an ASGI and a WSGI application, served by Hypercorn on a thread.

Hypercorn, because it runs within the process that asks what was recorded, starts in milliseconds, and speaks HTTP/2
with trailers and both directions at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from connectrpc.code import Code
from connectrpc.errors import ConnectError

from interceptors.gen.kontext.agent.v1 import event_connect, heartbeat_connect
from interceptors.testing.asgi import Running, WsgiBridge, client_gone, drained, routed
from interceptors.testing.attempts import Attempt, Refused

try:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
except ImportError as error:
    msg = "FakeServer serves Connect with Hypercorn: pip install 'interceptors[testing]'"
    raise ImportError(msg) from error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from connectrpc.request import RequestContext

    from interceptors.testing.services import Services


WSGI_PATH: Final = "/wsgi"


class ConnectServer:
    """Serves Connect on loopback when made: ASGI applications at `/`, WSGI applications at `WSGI_PATH`.

    Args:
        services: What is served.
        port: 0 for a free one.
        max_workers: How many calls may block a thread at the same time.
    """

    def __init__(self, services: Services, port: int, max_workers: int) -> None:
        # It listens from here on; who connects before the thread runs waits for a moment.
        self._socket = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        self._calls = Running(drained(_application(services)))
        self._max_workers = max_workers
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="fake-server-connect", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops to serve; calls that are still running are ended."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
        self._thread.join()

    async def _stop(self) -> None:
        # Hypercorn would end them with the group of their connection, in which their own end begins another task.
        await self._calls.cancel()
        self._stopping.set()

    def _serve(self) -> None:
        config = Config()
        config.bind = [f"fd://{self._socket.detach()}"]
        # A call that does not read must not keep the others of its connection waiting.
        config.max_app_queue_size = 0
        config.graceful_timeout = 0.0
        config.keep_alive_max_requests = 10**9
        config.h2_max_concurrent_streams = 1000
        config.errorlog = logging.getLogger("interceptors.testing")
        self._loop.set_exception_handler(_report)
        pool = ThreadPoolExecutor(self._max_workers, thread_name_prefix="fake-server-connect")
        self._loop.set_default_executor(pool)
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(serve(self._calls, config, shutdown_trigger=self._stopping.wait))  # type: ignore[arg-type]


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # Before 3.12, asyncio complains of each connection that is cancelled when the server stops.
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def _application(services: Services) -> Any:
    sync: list[Any] = [
        heartbeat_connect.HeartbeatServiceWSGIApplication(_SyncHeartbeats(services)),
        event_connect.EventServiceWSGIApplication(_SyncEvents(services)),
    ]
    asynchronous: list[Any] = [
        heartbeat_connect.HeartbeatServiceASGIApplication(_Heartbeats(services)),
        event_connect.EventServiceASGIApplication(_Events(services)),
    ]
    return routed(
        {
            **{f"{WSGI_PATH}{app.path}": WsgiBridge(app, WSGI_PATH) for app in sync},
            **{app.path: app for app in asynchronous},
        }
    )


def _attempt(services: Services, method: str, ctx: RequestContext[Any, Any]) -> Attempt:
    remaining = ctx.timeout_ms
    metadata = [(key.lower(), value) for key, value in ctx.request_headers.allitems()]
    attempt = Attempt(services, method, metadata, None if remaining is None else remaining / 1000)
    if (gone := client_gone.get(None)) is not None:
        gone.add_done_callback(lambda _: attempt.hang_up())
    return attempt


def _refusal(refused: Refused) -> ConnectError:
    return ConnectError(Code.CANCELED if refused.code == "CANCELLED" else Code[refused.code], str(refused))


class _Heartbeats:
    def __init__(self, services: Services) -> None:
        self._services = services

    async def heartbeat(self, request: Any, ctx: RequestContext[Any, Any]) -> Any:
        return await _unary(_attempt(self._services, "Heartbeat", ctx), request, self._services.heartbeat)

    async def get_session(self, request: Any, ctx: RequestContext[Any, Any]) -> Any:
        return await _unary(_attempt(self._services, "GetSession", ctx), request, self._services.session)

    async def watch_session(self, request: Any, ctx: RequestContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(
                _attempt(self._services, "WatchSession", ctx).watch_async(request)
            ) as changes:
                async for change in changes:
                    yield change
        except Refused as refused:
            raise _refusal(refused) from None


class _Events:
    def __init__(self, services: Services) -> None:
        self._services = services

    async def process_hook_event(self, request: Any, ctx: RequestContext[Any, Any]) -> Any:
        return await _unary(_attempt(self._services, "ProcessHookEvent", ctx), request, self._services.decision)

    async def ingest_events(self, request: AsyncIterator[Any], ctx: RequestContext[Any, Any]) -> Any:
        try:
            return await _attempt(self._services, "IngestEvents", ctx).ingest_async(request)
        except Refused as refused:
            raise _refusal(refused) from None

    async def stream_hook_events(
        self, request: AsyncIterator[Any], ctx: RequestContext[Any, Any]
    ) -> AsyncIterator[Any]:
        try:
            async for decision in _attempt(self._services, "StreamHookEvents", ctx).converse_async(request):
                yield decision
        except Refused as refused:
            raise _refusal(refused) from None


async def _unary(attempt: Attempt, request: Any, answer: Callable[[Any], Any]) -> Any:
    try:
        return await attempt.unary_async(request, answer)
    except Refused as refused:
        raise _refusal(refused) from None


class _SyncHeartbeats:
    def __init__(self, services: Services) -> None:
        self._services = services

    def heartbeat(self, request: Any, ctx: RequestContext[Any, Any]) -> Any:
        return _unary_sync(_attempt(self._services, "Heartbeat", ctx), request, self._services.heartbeat)

    def get_session(self, request: Any, ctx: RequestContext[Any, Any]) -> Any:
        return _unary_sync(_attempt(self._services, "GetSession", ctx), request, self._services.session)

    def watch_session(self, request: Any, ctx: RequestContext[Any, Any]) -> Iterator[Any]:
        try:
            yield from _attempt(self._services, "WatchSession", ctx).watch(request)
        except Refused as refused:
            raise _refusal(refused) from None


class _SyncEvents:
    def __init__(self, services: Services) -> None:
        self._services = services

    def process_hook_event(self, request: Any, ctx: RequestContext[Any, Any]) -> Any:
        return _unary_sync(_attempt(self._services, "ProcessHookEvent", ctx), request, self._services.decision)

    def ingest_events(self, request: Iterator[Any], ctx: RequestContext[Any, Any]) -> Any:
        try:
            return _attempt(self._services, "IngestEvents", ctx).ingest(request)
        except Refused as refused:
            raise _refusal(refused) from None

    def stream_hook_events(self, request: Iterator[Any], ctx: RequestContext[Any, Any]) -> Iterator[Any]:
        try:
            yield from _attempt(self._services, "StreamHookEvents", ctx).converse(request)
        except Refused as refused:
            raise _refusal(refused) from None


def _unary_sync(attempt: Attempt, request: Any, answer: Callable[[Any], Any]) -> Any:
    try:
        return attempt.unary(request, answer)
    except Refused as refused:
        raise _refusal(refused) from None

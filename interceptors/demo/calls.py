"""The five kinds of call that a session makes, in each flavour."""

from __future__ import annotations

import asyncio
import queue
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from connectrpc.protocol import ProtocolType
from pyqwest import Client, HTTPTransport, HTTPVersion, SyncClient, SyncHTTPTransport

from interceptors import ConnectBearerInterceptor, authenticated_channel
from interceptors.gen.kontext.agent.v1 import (
    event_connect,
    event_pb2,
    event_pb2_grpc,
    heartbeat_connect,
    heartbeat_pb2,
    heartbeat_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from types import TracebackType

    from interceptors import TokenSource
    from interceptors.testing import FakeServer

DEADLINE_SECONDS: Final = 10.0
_DEADLINE_MS: Final = int(DEADLINE_SECONDS * 1000)


class Calls(Protocol):
    """A flavour's calls; those of an async one return awaitables."""

    def heartbeat(self, identifier: str) -> Any:
        """A heartbeat of the session `identifier`."""

    def event(self, identifier: str) -> Any:
        """One event, unary."""

    def upload(self, identifiers: Sequence[str]) -> Any:
        """A client stream of events."""

    def converse(self, next_identifiers: Iterable[Callable[[], str]]) -> Any:
        """A bidirectional stream in which each event waits for the decision on the one before."""


def _heartbeat(identifier: str) -> heartbeat_pb2.HeartbeatRequest:
    return heartbeat_pb2.HeartbeatRequest(session_id=identifier)


def _event(identifier: str) -> event_pb2.HookEvent:
    return event_pb2.HookEvent(event_id=identifier, hook_event_name="PreToolUse", tool_name="Read", tool_input=b"{}")


def _unary(identifier: str) -> event_pb2.ProcessHookEventRequest:
    return event_pb2.ProcessHookEventRequest(event=_event(identifier))


def _uploaded(identifier: str) -> event_pb2.IngestEventsRequest:
    return event_pb2.IngestEventsRequest(event=_event(identifier))


def _said(identifier: str) -> event_pb2.StreamHookEventsRequest:
    return event_pb2.StreamHookEventsRequest(event=_event(identifier))


class GrpcCalls:
    """grpc sync; events by futures."""

    def __init__(self, server: FakeServer, source: TokenSource) -> None:
        self._channel = authenticated_channel(server.target, source)
        self._heartbeats: Any = heartbeat_pb2_grpc.HeartbeatServiceStub(self._channel)
        self._events: Any = event_pb2_grpc.EventServiceStub(self._channel)

    def heartbeat(self, identifier: str) -> Any:
        return self._heartbeats.Heartbeat(_heartbeat(identifier), timeout=DEADLINE_SECONDS)

    def event(self, identifier: str) -> Any:
        return self._events.ProcessHookEvent.future(_unary(identifier), timeout=DEADLINE_SECONDS).result()

    def upload(self, identifiers: Sequence[str]) -> Any:
        return self._events.IngestEvents(map(_uploaded, identifiers), timeout=DEADLINE_SECONDS)

    def converse(self, next_identifiers: Iterable[Callable[[], str]]) -> None:
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        _converse(said, self._events.StreamHookEvents(iter(said.get, None), timeout=DEADLINE_SECONDS), next_identifiers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()


class ConnectCalls:
    """ConnectClientSync, over HTTP/2."""

    def __init__(self, server: FakeServer, source: TokenSource) -> None:
        self._transport = SyncHTTPTransport(http_version=HTTPVersion.HTTP2)
        given: Any = _connect_options(SyncClient(self._transport), source)
        self._heartbeats = heartbeat_connect.HeartbeatServiceClientSync(server.url, **given)
        self._events = event_connect.EventServiceClientSync(server.url, **given)

    def heartbeat(self, identifier: str) -> Any:
        return self._heartbeats.heartbeat(_heartbeat(identifier))

    def event(self, identifier: str) -> Any:
        return self._events.process_hook_event(_unary(identifier))

    def upload(self, identifiers: Sequence[str]) -> Any:
        return self._events.ingest_events(map(_uploaded, identifiers))

    def converse(self, next_identifiers: Iterable[Callable[[], str]]) -> None:
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        _converse(said, self._events.stream_hook_events(iter(said.get, None)), next_identifiers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._transport.close()


class AioCalls:
    """grpc.aio."""

    def __init__(self, server: FakeServer, source: TokenSource) -> None:
        self._channel = authenticated_channel(server.target, source, aio=True)
        self._heartbeats: Any = heartbeat_pb2_grpc.HeartbeatServiceStub(self._channel)
        self._events: Any = event_pb2_grpc.EventServiceStub(self._channel)

    async def heartbeat(self, identifier: str) -> Any:
        return await self._heartbeats.Heartbeat(_heartbeat(identifier), timeout=DEADLINE_SECONDS)

    async def event(self, identifier: str) -> Any:
        return await self._events.ProcessHookEvent(_unary(identifier), timeout=DEADLINE_SECONDS)

    async def upload(self, identifiers: Sequence[str]) -> Any:
        return await self._events.IngestEvents(map(_uploaded, identifiers), timeout=DEADLINE_SECONDS)

    async def converse(self, next_identifiers: Iterable[Callable[[], str]]) -> None:
        call = self._events.StreamHookEvents(timeout=DEADLINE_SECONDS)
        for next_identifier in next_identifiers:
            await call.write(_said(next_identifier()))
            await call.read()
        await call.done_writing()
        await call.read()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()


class ConnectAioCalls:
    """ConnectClient, over HTTP/2."""

    def __init__(self, server: FakeServer, source: TokenSource) -> None:
        self._transport = HTTPTransport(http_version=HTTPVersion.HTTP2)
        given: Any = _connect_options(Client(self._transport), source)
        self._heartbeats = heartbeat_connect.HeartbeatServiceClient(server.url, **given)
        self._events = event_connect.EventServiceClient(server.url, **given)

    async def heartbeat(self, identifier: str) -> Any:
        return await self._heartbeats.heartbeat(_heartbeat(identifier))

    async def event(self, identifier: str) -> Any:
        return await self._events.process_hook_event(_unary(identifier))

    async def upload(self, identifiers: Sequence[str]) -> Any:
        async def requests() -> AsyncIterator[Any]:
            for identifier in identifiers:
                yield _uploaded(identifier)

        return await self._events.ingest_events(requests())

    async def converse(self, next_identifiers: Iterable[Callable[[], str]]) -> None:
        said: asyncio.Queue[Any] = asyncio.Queue()

        async def requests() -> AsyncIterator[Any]:
            while (message := await said.get()) is not None:
                yield message

        answers = self._events.stream_hook_events(requests())
        for next_identifier in next_identifiers:
            said.put_nowait(_said(next_identifier()))
            await anext(aiter(answers))
        said.put_nowait(None)
        async for _ in answers:
            pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._transport.aclose()


def _connect_options(http_client: object, source: TokenSource) -> dict[str, object]:
    return {
        "protocol": ProtocolType.CONNECT,
        "http_client": http_client,
        "timeout_ms": _DEADLINE_MS,
        "interceptors": [ConnectBearerInterceptor(source)],
    }


def _converse(said: queue.SimpleQueue[Any], answers: Any, next_identifiers: Iterable[Callable[[], str]]) -> None:
    try:
        for next_identifier in next_identifiers:
            said.put(_said(next_identifier()))
            next(answers)
    finally:
        said.put(None)
    for _ in answers:
        pass

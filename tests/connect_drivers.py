"""Drivers for the two Connect flavours, with the interface of `behaviour_drivers`."""

from __future__ import annotations

import asyncio
import threading

from connectrpc.errors import ConnectError
from connectrpc.protocol import ProtocolType
from pyqwest import Client, HTTPTransport, HTTPVersion, SyncClient, SyncHTTPTransport

from interceptors import ConnectBearerInterceptor
from interceptors.gen.kontext.agent.v1 import event_connect, event_pb2, heartbeat_connect, heartbeat_pb2

CONNECT_WAYS = {
    "connect": (ProtocolType.CONNECT, HTTPVersion.HTTP2),
    "connect-h1": (ProtocolType.CONNECT, HTTPVersion.HTTP1),
    "grpc": (ProtocolType.GRPC, HTTPVersion.HTTP2),
    "grpc_web": (ProtocolType.GRPC_WEB, HTTPVersion.HTTP1),
}


def event(event_id):
    return event_pb2.HookEvent(session_id="s", event_id=str(event_id), hook_event_name="PreToolUse")


def converted(options):
    """gRPC's options as Connect's."""
    given = {}
    if "metadata" in options:
        given["headers"] = list(options["metadata"])
    if "timeout" in options:
        given["timeout_ms"] = int(options["timeout"] * 1000)
    return given


def ingest_requests(ids):
    return (event_pb2.IngestEventsRequest(event=event(i)) for i in ids)


def converse_requests(ids):
    return (event_pb2.StreamHookEventsRequest(event=event(i)) for i in ids)


async def asynchronous(requests):
    for request in requests:
        yield request


class ConnectDriver:
    """ConnectClientSync."""

    def __init__(self, server, source, way, **options):
        protocol, version = CONNECT_WAYS[way]
        self.transport = SyncHTTPTransport(http_version=version)
        given = {
            "protocol": protocol,
            "http_client": SyncClient(self.transport),
            "interceptors": [ConnectBearerInterceptor(source, **options)],
        }
        self.heartbeats = heartbeat_connect.HeartbeatServiceClientSync(server.url, **given)
        self.events = event_connect.EventServiceClientSync(server.url, **given)

    def unary(self, sequence=1, **options):
        request = heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=sequence)
        return self.heartbeats.heartbeat(request, **converted(options))

    def server_stream(self, count=3, **options):
        request = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=count)
        return [response.sequence for response in self.heartbeats.watch_session(request, **converted(options))]

    def client_stream(self, ids=("1", "2", "3"), **options):
        return list(self.events.ingest_events(ingest_requests(ids), **converted(options)).event_ids)

    def bidi(self, ids=("1", "2", "3"), **options):
        return [
            response.event_id
            for response in self.events.stream_hook_events(converse_requests(ids), **converted(options))
        ]

    def first_responses(self, count, **options):
        seen = []
        request = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=count)
        try:
            for response in self.heartbeats.watch_session(request, **converted(options)):
                seen.append(response.sequence)
        except ConnectError as error:
            return seen, error
        return seen, None

    def close(self):
        self.transport.close()


class ConnectAioDriver:
    """ConnectClient, on an event loop in a thread."""

    new_event_loop = staticmethod(asyncio.new_event_loop)

    def __init__(self, server, source, way, **options):
        self.loop = self.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.run(self._open(server, source, way, options))

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    async def _open(self, server, source, way, options):
        protocol, version = CONNECT_WAYS[way]
        self.transport = HTTPTransport(http_version=version)
        given = {
            "protocol": protocol,
            "http_client": Client(self.transport),
            "interceptors": [ConnectBearerInterceptor(source, **options)],
        }
        self.heartbeats = heartbeat_connect.HeartbeatServiceClient(server.url, **given)
        self.events = event_connect.EventServiceClient(server.url, **given)

    def unary(self, sequence=1, **options):
        request = heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=sequence)
        return self.run(self.heartbeats.heartbeat(request, **converted(options)))

    def server_stream(self, count=3, **options):
        async def call():
            request = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=count)
            responses = self.heartbeats.watch_session(request, **converted(options))
            return [response.sequence async for response in responses]

        return self.run(call())

    def client_stream(self, ids=("1", "2", "3"), **options):
        async def call():
            requests = asynchronous(ingest_requests(ids))
            return list((await self.events.ingest_events(requests, **converted(options))).event_ids)

        return self.run(call())

    def bidi(self, ids=("1", "2", "3"), **options):
        async def call():
            requests = asynchronous(converse_requests(ids))
            responses = self.events.stream_hook_events(requests, **converted(options))
            return [response.event_id async for response in responses]

        return self.run(call())

    def first_responses(self, count, **options):
        async def call():
            seen = []
            request = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=count)
            try:
                async for response in self.heartbeats.watch_session(request, **converted(options)):
                    seen.append(response.sequence)
            except ConnectError as error:
                return seen, error
            return seen, None

        return self.run(call())

    async def _close(self):
        await self.transport.aclose()

    def close(self):
        self.run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

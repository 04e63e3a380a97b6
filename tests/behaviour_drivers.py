"""A driver for each flavour and every way in, so that one table of behaviour serves them all."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import grpc
import grpc.aio
from connect_drivers import CONNECT_WAYS, ConnectAioDriver, ConnectDriver, converse_requests, ingest_requests
from connectrpc.errors import ConnectError
from event_loops import LOOPS

from interceptors import (
    BearerInterceptor,
    Token,
    TokenSource,
    aio_bearer_interceptors,
    intercept_channel,
    intercept_stub,
)
from interceptors.gen.kontext.agent.v1 import event_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc


class SyncDriver:
    """grpc sync."""

    def __init__(self, server, source, way, **options):
        plain = grpc.insecure_channel(server.target, options=[("grpc.enable_retries", 0)])
        self.plain = plain
        if way == "intercept_channel":
            self.channel = intercept_channel(plain, source, **options)
        elif way == "native":
            self.channel = grpc.intercept_channel(plain, BearerInterceptor(source, **options))
        else:
            self.channel = plain
        self.heartbeats = heartbeat_pb2_grpc.HeartbeatServiceStub(self.channel)
        self.events = event_pb2_grpc.EventServiceStub(self.channel)
        if way == "intercept_stub":
            self.heartbeats = intercept_stub(self.heartbeats, source, **options)
            self.events = intercept_stub(self.events, source, **options)

    def unary(self, sequence=1, **options):
        return self.heartbeats.Heartbeat(heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=sequence), **options)

    def server_stream(self, count=3, **options):
        request = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=count)
        return [response.sequence for response in self.heartbeats.WatchSession(request, **options)]

    def client_stream(self, ids=("1", "2", "3"), **options):
        return list(self.events.IngestEvents(ingest_requests(ids), **options).event_ids)

    def bidi(self, ids=("1", "2", "3"), **options):
        return [r.event_id for r in self.events.StreamHookEvents(converse_requests(ids), **options)]

    def first_responses(self, count, **options):
        """The first responses of a stream, and the error that ends it."""
        seen = []
        request = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=count)
        try:
            for response in self.heartbeats.WatchSession(request, **options):
                seen.append(response.sequence)
        except grpc.RpcError as error:
            return seen, error
        return seen, None

    def close(self):
        self.channel.close()


class AioDriver:
    """grpc.aio, on an event loop in a thread."""

    new_event_loop = staticmethod(asyncio.new_event_loop)

    def __init__(self, server, source, way, **options):
        self.loop = self.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.run(self._open(server.target, source, way, options))

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    async def _open(self, target, source, way, options):
        native = aio_bearer_interceptors(source, **options) if way == "native" else None
        self.channel = grpc.aio.insecure_channel(target, options=[("grpc.enable_retries", 0)], interceptors=native)
        if way == "intercept_channel":
            self.channel = intercept_channel(self.channel, source, **options)
        self.heartbeats = heartbeat_pb2_grpc.HeartbeatServiceStub(self.channel)
        self.events = event_pb2_grpc.EventServiceStub(self.channel)
        if way == "intercept_stub":
            self.heartbeats = intercept_stub(self.heartbeats, source, **options)
            self.events = intercept_stub(self.events, source, **options)

    def unary(self, sequence=1, **options):
        async def call():
            request = heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=sequence)
            return await self.heartbeats.Heartbeat(request, **options)

        return self.run(call())

    def server_stream(self, count=3, **options):
        async def call():
            request = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=count)
            return [response.sequence async for response in self.heartbeats.WatchSession(request, **options)]

        return self.run(call())

    def client_stream(self, ids=("1", "2", "3"), **options):
        async def call():
            return list((await self.events.IngestEvents(ingest_requests(ids), **options)).event_ids)

        return self.run(call())

    def bidi(self, ids=("1", "2", "3"), **options):
        async def call():
            return [r.event_id async for r in self.events.StreamHookEvents(converse_requests(ids), **options)]

        return self.run(call())

    def first_responses(self, count, **options):
        async def call():
            seen = []
            request = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=count)
            try:
                async for response in self.heartbeats.WatchSession(request, **options):
                    seen.append(response.sequence)
            except grpc.RpcError as error:
                return seen, error
            return seen, None

        return self.run(call())

    def close(self):
        self.run(self.channel.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def on(loop, driver):
    """`driver`, on another event loop than asyncio's own."""
    return type(f"{loop}{driver.__name__}", (driver,), {"new_event_loop": staticmethod(LOOPS[loop])})


FLAVOURS = {"grpc": SyncDriver, "aio": AioDriver, "connect": ConnectDriver, "connect-aio": ConnectAioDriver}
# What makes Connect's requests has a thread of its own, so that the loop matters little to it.
FLAVOURS |= {f"aio-{loop}": on(loop, AioDriver) for loop in LOOPS if loop != "asyncio"}
FLAVOURS |= {f"connect-aio-{loop}": on(loop, ConnectAioDriver) for loop in LOOPS if loop == "eager"}

GRPC_WAYS = ("intercept_channel", "intercept_stub", "native")
WAYS = {flavour: CONNECT_WAYS if flavour.startswith("connect") else GRPC_WAYS for flavour in FLAVOURS}
RPC_ERRORS = (grpc.RpcError, ConnectError)
KINDS = ("unary", "server_stream", "client_stream", "bidi")
EXPECTED = {"server_stream": [1, 2, 3], "client_stream": ["1", "2", "3"], "bidi": ["1", "2", "3"]}


@contextmanager
def driving(flavour, server, source, way=None, **options):
    driver = FLAVOURS[flavour](server, source, way or next(iter(WAYS[flavour])), **options)
    try:
        yield driver
    finally:
        driver.close()


def code_of(error):
    """The name that gRPC has for an error's status."""
    name = error.code.name if isinstance(error, ConnectError) else error.code().name
    return "CANCELLED" if name == "CANCELED" else name


def details_of(error):
    return error.message if isinstance(error, ConnectError) else error.details()


class SlowSource(TokenSource):
    """Gets a new token from the issuer whenever one was rejected, as slowly as it is told."""

    def __init__(self, issuer):
        self._issuer = issuer
        self._token = Token(issuer.session().access_token)
        self._rejected = False
        self._open = threading.Event()
        self._open.set()
        self._waiting = threading.Event()

    def hold(self):
        self._open.clear()

    def release(self):
        self._open.set()

    def waited_for(self, seconds):
        """Whether somebody has come to wait; lets `seconds` of their time pass."""
        came = self._waiting.wait(10)
        self._open.wait(seconds)
        return came

    def token(self, *, timeout=None):
        if self._rejected:
            self._waiting.set()
            if not self._open.wait(timeout):
                raise TimeoutError
            self._token, self._rejected = Token(self._issuer.session().access_token), False
        return self._token

    def peek(self):
        return None if self._rejected else self._token

    def reject(self, token):
        self._rejected = self._rejected or token == self._token

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.release()

"""The conformance suite's client under test: makes the calls that the runner describes with connectrpc's clients.

    client.py --flavour sync|async [--with-interceptor] DESCRIPTORS

Requests come on standard input and results go to standard output, each a message behind its size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from connectrpc.client import ConnectClient, ConnectClientSync, ResponseMetadata
from connectrpc.code import Code
from connectrpc.compat import google_protobuf_binary_codec, google_protobuf_json_codec
from connectrpc.compression.gzip import GzipCompression
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.protocol import ProtocolType
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, empty_pb2, message_factory, struct_pb2
from pyqwest import Client, HTTPTransport, HTTPVersion, SyncClient, SyncHTTPTransport

from interceptors import ConnectBearerInterceptor, StaticTokenSource

WELL_KNOWN = (any_pb2, empty_pb2, struct_pb2)
PACKAGE = "connectrpc.conformance.v1"
SERVICE = f"{PACKAGE}.ConformanceService"
PROTOCOLS = {1: ProtocolType.CONNECT, 2: ProtocolType.GRPC, 3: ProtocolType.GRPC_WEB}
VERSIONS = {1: HTTPVersion.HTTP1, 2: HTTPVersion.HTTP2}
CODECS = {1: google_protobuf_binary_codec(), 2: google_protobuf_json_codec()}
COMPRESSIONS = {0: None, 1: None, 2: GzipCompression()}
STREAM_TYPES = {
    "Unary": StreamType.UNARY,
    "IdempotentUnary": StreamType.UNARY,
    "Unimplemented": StreamType.UNARY,
    "ClientStream": StreamType.CLIENT_STREAM,
    "ServerStream": StreamType.SERVER_STREAM,
    "BidiStream": StreamType.BIDI_STREAM,
}
FULL_DUPLEX = 5


class Suite:
    """The suite's messages."""

    def __init__(self, descriptors: Path) -> None:
        # The pool where JSON's parser looks for what is packed; it has the well-known types.
        self._pool = descriptor_pool.Default()
        for file in descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes()).file:
            if file.package == PACKAGE:
                self._pool.AddSerializedFile(file.SerializeToString())

    def message(self, name: str) -> Any:
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))

    def method(self, name: str) -> MethodInfo[Any, Any]:
        return MethodInfo(
            name=name,
            service_name=SERVICE,
            input=self.message(f"{name}Request"),
            output=self.message(f"{name}Response"),
            idempotency_level=(
                IdempotencyLevel.NO_SIDE_EFFECTS if name == "IdempotentUnary" else IdempotencyLevel.UNKNOWN
            ),
            stream_type=STREAM_TYPES[name],
        )


class Task:
    """One call to be made, and what comes of it."""

    def __init__(self, suite: Suite, wanted: Any, *, with_interceptor: bool) -> None:
        self.suite = suite
        self.wanted = wanted
        self.result = suite.message("ClientResponseResult")()
        self.method = suite.method(wanted.method)
        self.requests = [self.method.input.FromString(packed.value) for packed in wanted.request_messages]
        self.delay = wanted.request_delay_ms / 1000
        self.sent = 0
        self.cancel = wanted.cancel.WhichOneof("cancel_timing") if wanted.HasField("cancel") else None
        self.interceptors = [ConnectBearerInterceptor(StaticTokenSource("conformance"))] if with_interceptor else []

    def client_options(self) -> dict[str, Any]:
        wanted = self.wanted
        scheme = "https" if wanted.server_tls_cert else "http"
        return {
            "address": f"{scheme}://{wanted.host}:{wanted.port}",
            "protocol": PROTOCOLS[wanted.protocol],
            "codec": CODECS[wanted.codec],
            "send_compression": COMPRESSIONS[wanted.compression],
            "accept_compression": [GzipCompression()] if wanted.compression == 2 else [],
            "read_max_bytes": wanted.message_receive_limit or None,
            "interceptors": self.interceptors,
        }

    def transport_options(self) -> dict[str, Any]:
        wanted = self.wanted
        options: dict[str, Any] = {"http_version": VERSIONS[wanted.http_version]}
        if wanted.server_tls_cert:
            options["tls_ca_cert"] = wanted.server_tls_cert
        if wanted.HasField("client_tls_creds"):
            options["tls_cert"] = wanted.client_tls_creds.cert
            options["tls_key"] = wanted.client_tls_creds.key
        return options

    def call_options(self) -> dict[str, Any]:
        headers = [(header.name, value) for header in self.wanted.request_headers for value in header.value]
        options: dict[str, Any] = {"method": self.method, "headers": headers}
        if self.wanted.HasField("timeout_ms"):
            options["timeout_ms"] = self.wanted.timeout_ms
        if self.method.stream_type is StreamType.UNARY:
            options["use_get"] = self.wanted.use_get_http_method
        return options

    def received(self, response: Any) -> bool:
        """Keeps a response; True if the call is to be cancelled now."""
        self.result.payloads.append(response.payload)
        return self.cancel == "after_num_responses" and len(self.result.payloads) >= (
            self.wanted.cancel.after_num_responses
        )

    def cancelled(self) -> None:
        self.result.error.code = 1
        self.result.error.message = "cancelled"

    def failed(self, error: ConnectError) -> None:
        self.result.error.code = list(Code).index(error.code) + 1
        self.result.error.message = error.message
        for detail in error.details:
            packed = any_pb2.Any(type_url=f"type.googleapis.com/{detail.type_name}", value=detail.message_bytes)
            self.result.error.details.append(packed)

    def ended(self, response: ResponseMetadata) -> None:
        for headers, into in (
            (response.headers, self.result.response_headers),
            (response.trailers, self.result.response_trailers),
        ):
            for name in headers:
                into.add(name=name, value=headers.getall(name))
        if response.http_status is not None:
            self.result.http_status_code = response.http_status
        if self.method.stream_type is not StreamType.UNARY:
            self.result.num_unsent_requests = len(self.requests) - self.sent


# Sync


def run_sync(task: Task) -> None:
    with SyncHTTPTransport(**task.transport_options()) as transport, ResponseMetadata() as response:
        client = ConnectClientSync(http_client=SyncClient(transport), **task.client_options())
        try:
            call_sync(task, client)
        except ConnectError as error:
            task.failed(error)
        finally:
            task.ended(response)


def call_sync(task: Task, client: ConnectClientSync) -> None:
    kind, options = task.method.stream_type, task.call_options()
    if kind is StreamType.UNARY:
        task.received(client.execute_unary(request=task.requests[0], **options))
    elif kind is StreamType.CLIENT_STREAM:
        task.received(client.execute_client_stream(request=requests_of(task, threading.Semaphore(10**6)), **options))
    elif kind is StreamType.SERVER_STREAM:
        task.sent = 1
        receive(task, client.execute_server_stream(request=task.requests[0], **options), None)
    else:
        full_duplex = task.wanted.stream_type == FULL_DUPLEX
        turn = threading.Semaphore(1 if full_duplex else 10**6)
        receive(task, client.execute_bidi_stream(request=requests_of(task, turn), **options), turn)


def requests_of(task: Task, turn: threading.Semaphore) -> Any:
    for request in task.requests:
        turn.acquire()
        time.sleep(task.delay)
        task.sent += 1
        yield request


def receive(task: Task, responses: Any, turn: threading.Semaphore | None) -> None:
    with contextlib.closing(responses):
        for response in responses:
            if task.received(response):
                task.cancelled()
                return
            if turn is not None:
                turn.release()


# Async


async def run_async(task: Task) -> None:
    async with HTTPTransport(**task.transport_options()) as transport:
        with ResponseMetadata() as response:
            client = ConnectClient(http_client=Client(transport), **task.client_options())
            closing = asyncio.Event()
            calling = asyncio.ensure_future(call_async(task, client, closing))
            cancelling = asyncio.ensure_future(cancel_in_time(task, calling, closing))
            try:
                await calling
            except ConnectError as error:
                task.failed(error)
            except asyncio.CancelledError:
                task.cancelled()
            finally:
                cancelling.cancel()
                task.ended(response)


async def cancel_in_time(task: Task, calling: asyncio.Task[None], closing: asyncio.Event) -> None:
    if task.cancel in {"before_close_send", "after_close_send_ms"}:
        await closing.wait()
        await asyncio.sleep(task.wanted.cancel.after_close_send_ms / 1000)
        calling.cancel()


async def call_async(task: Task, client: ConnectClient, closing: asyncio.Event) -> None:
    kind, options = task.method.stream_type, task.call_options()
    if kind is StreamType.UNARY:
        closing.set()
        task.received(await client.execute_unary(request=task.requests[0], **options))
    elif kind is StreamType.CLIENT_STREAM:
        requests = requests_of_async(task, asyncio.Semaphore(10**6), closing)
        task.received(await client.execute_client_stream(request=requests, **options))
    elif kind is StreamType.SERVER_STREAM:
        task.sent = 1
        closing.set()
        await receive_async(task, client.execute_server_stream(request=task.requests[0], **options), None)
    else:
        turn = asyncio.Semaphore(1 if task.wanted.stream_type == FULL_DUPLEX else 10**6)
        requests = requests_of_async(task, turn, closing)
        await receive_async(task, client.execute_bidi_stream(request=requests, **options), turn)


async def requests_of_async(task: Task, turn: asyncio.Semaphore, closing: asyncio.Event) -> Any:
    for request in task.requests:
        await turn.acquire()
        await asyncio.sleep(task.delay)
        task.sent += 1
        yield request
    await turn.acquire()  # in full duplex, until the last one is answered
    closing.set()
    if task.cancel == "before_close_send":
        await asyncio.get_running_loop().create_future()


async def receive_async(task: Task, responses: Any, turn: asyncio.Semaphore | None) -> None:
    async with contextlib.aclosing(responses):
        async for response in responses:
            if task.received(response):
                task.cancelled()
                return
            if turn is not None:
                turn.release()


# The runner's protocol


def wanted_calls(suite: Suite) -> Any:
    kind = suite.message("ClientCompatRequest")
    while size := sys.stdin.buffer.read(4):
        yield kind.FromString(sys.stdin.buffer.read(struct.unpack(">I", size)[0]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("descriptors", type=Path)
    parser.add_argument("--flavour", choices=["sync", "async"], required=True)
    parser.add_argument("--with-interceptor", action="store_true")
    given = parser.parse_args()
    suite = Suite(given.descriptors)
    writing = threading.Lock()

    def make(wanted: Any) -> None:
        answer = suite.message("ClientCompatResponse")(test_name=wanted.test_name)
        try:
            task = Task(suite, wanted, with_interceptor=given.with_interceptor)
            if given.flavour == "sync":
                run_sync(task)
            else:
                asyncio.run(run_async(task))
            answer.response.CopyFrom(task.result)
        except Exception as error:
            answer.error.message = f"{type(error).__name__}: {error}"
        data = answer.SerializeToString()
        with writing:
            sys.stdout.buffer.write(struct.pack(">I", len(data)) + data)
            sys.stdout.buffer.flush()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(make, wanted) for wanted in itertools.chain(wanted_calls(suite))]:
            future.result()


if __name__ == "__main__":
    main()

"""grpc sync: unary calls and the three kinds of stream."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import google.auth.credentials
import google.auth.transport.grpc
import grpc

from benchmarks.measuring import paired, ratios, row
from interceptors import BearerInterceptor, StaticTokenSource, intercept_channel
from interceptors.gen.kontext.agent.v1 import event_pb2, event_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc

TOKEN = "t" * 800
METADATA = (("authorization", f"Bearer {TOKEN}"),)


class NoOp(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def intercept_unary_unary(self, continuation, client_call_details, request):
        return continuation(client_call_details, request)

    intercept_unary_stream = intercept_stream_unary = intercept_stream_stream = intercept_unary_unary


class GoogleCredentials(google.auth.credentials.Credentials):
    """Fresh for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.token = TOKEN

    def refresh(self, request):
        raise AssertionError


def unary(plain: str, local: str, rounds: int, calls: int) -> None:
    source = StaticTokenSource(TOKEN)
    request = heartbeat_pb2.HeartbeatRequest(session_id="bench", agent="bench", sequence=1)
    local_credentials = grpc.local_channel_credentials()
    plugin = google.auth.transport.grpc.AuthMetadataPlugin(GoogleCredentials(), request=None)
    with (
        # One connection for all, as connections differ more than the variants do.
        grpc.insecure_channel(plain) as by_hand,
        grpc.secure_channel(local, local_credentials) as local_by_hand,
        grpc.secure_channel(
            local, grpc.composite_channel_credentials(local_credentials, grpc.metadata_call_credentials(plugin))
        ) as google_auth,
    ):
        ours = intercept_channel(by_hand, source)
        native = grpc.intercept_channel(by_hand, BearerInterceptor(source))
        no_op = grpc.intercept_channel(by_hand, NoOp())

        def caller(channel: grpc.Channel, metadata: Any = None) -> Callable[[], None]:
            heartbeat = heartbeat_pb2_grpc.HeartbeatServiceStub(channel).Heartbeat

            def run() -> None:
                for _ in range(calls):
                    heartbeat(request, metadata=metadata, timeout=10)

            return run

        measured = paired(
            {
                "metadata by hand": caller(by_hand, METADATA),
                "intercept_channel": caller(ours),
                "BearerInterceptor": caller(native),
                "gRPC's no-op interceptor, by hand": caller(no_op, METADATA),
                "local credentials, by hand": caller(local_by_hand, METADATA),
                "google-auth's AuthMetadataPlugin": caller(google_auth),
            },
            rounds,
        )
    print(f"\ngrpc sync, unary ({rounds} rounds of {calls} calls): client CPU, wall time")
    cpu, wall = ratios(measured, "metadata by hand", 0), ratios(measured, "metadata by hand", 1)
    for name in measured:
        print(row(name, cpu[name], wall[name]))
    on_local = ratios(measured, "local credentials, by hand", 0)["google-auth's AuthMetadataPlugin"]
    print(row("  the plugin over local, by hand", on_local))


def streams(target: str, rounds: int, messages: int) -> None:
    with grpc.insecure_channel(target) as by_hand:
        ours = intercept_channel(by_hand, StaticTokenSource(TOKEN))
        print(f"\ngrpc sync, streams ({rounds} rounds of {messages} messages): messages per second, of by hand's")
        for label, call in (("server stream", watch), ("client stream", ingest), ("bidirectional stream", converse)):

            def run(channel: grpc.Channel, metadata: Any, call: Callable[..., None] = call) -> Callable[[], None]:
                return lambda: call(channel, metadata, messages)

            measured = paired({"by hand": run(by_hand, METADATA), "intercept_channel": run(ours, None)}, rounds)
            median, low, high = ratios(measured, "by hand", 1)["intercept_channel"]
            print(row(label, (1 / median, 1 / high, 1 / low)))


def watch(channel: grpc.Channel, metadata: Any, messages: int) -> None:
    stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
    responses = stub.WatchSession(heartbeat_pb2.WatchSessionRequest(max_messages=messages), metadata=metadata)
    collections.deque(responses, maxlen=0)


def ingest(channel: grpc.Channel, metadata: Any, messages: int) -> None:
    request = event_pb2.IngestEventsRequest(event=event_pb2.HookEvent(event_id="1"))
    answer = event_pb2_grpc.EventServiceStub(channel).IngestEvents(
        (request for _ in range(messages)), metadata=metadata
    )
    assert answer.accepted == messages


def converse(channel: grpc.Channel, metadata: Any, messages: int) -> None:
    request = event_pb2.StreamHookEventsRequest(event=event_pb2.HookEvent(event_id="1"))
    stub = event_pb2_grpc.EventServiceStub(channel)
    answers = stub.StreamHookEvents((request for _ in range(messages)), metadata=metadata)
    assert sum(1 for _ in answers) == messages

"""grpc.aio: unary calls and the three kinds of stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from benchmarks.grpc_sync import METADATA, TOKEN
from benchmarks.measuring import paired, ratios, row
from interceptors import StaticTokenSource, aio_bearer_interceptors, intercept_channel
from interceptors.gen.kontext.agent.v1 import event_pb2, event_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc


class NoOp(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation, client_call_details, request):
        return await continuation(client_call_details, request)


def unary(target: str, rounds: int, calls: int) -> None:
    source = StaticTokenSource(TOKEN)
    request = heartbeat_pb2.HeartbeatRequest(session_id="bench", agent="bench", sequence=1)
    with asyncio.Runner() as runner:

        async def channels() -> dict[str, tuple[grpc.aio.Channel, Any]]:
            by_hand = grpc.aio.insecure_channel(target)
            return {
                "metadata by hand": (by_hand, METADATA),
                "metadata by hand, another channel": (grpc.aio.insecure_channel(target), METADATA),
                "intercept_channel": (intercept_channel(by_hand, source), None),
                "aio_bearer_interceptors": (
                    grpc.aio.insecure_channel(target, interceptors=aio_bearer_interceptors(source)),
                    None,
                ),
                "gRPC's no-op interceptor, by hand": (
                    grpc.aio.insecure_channel(target, interceptors=[NoOp()]),
                    METADATA,
                ),
            }

        def caller(channel: grpc.aio.Channel, metadata: Any) -> Callable[[], None]:
            heartbeat: Any = heartbeat_pb2_grpc.HeartbeatServiceStub(channel).Heartbeat

            async def run() -> None:
                for _ in range(calls):
                    await heartbeat(request, metadata=metadata, timeout=10)

            return lambda: runner.run(run())

        opened = runner.run(channels())
        measured = paired({name: caller(*variant) for name, variant in opened.items()}, rounds)
        for channel, _ in opened.values():
            runner.run(_closed(channel))
    print(f"\ngrpc.aio, unary ({rounds} rounds of {calls} calls): client CPU, wall time")
    cpu, wall = ratios(measured, "metadata by hand", 0), ratios(measured, "metadata by hand", 1)
    for name in measured:
        print(row(name, cpu[name], wall[name]))


def streams(target: str, rounds: int, messages: int) -> None:
    with asyncio.Runner() as runner:

        async def channels() -> tuple[grpc.aio.Channel, grpc.aio.Channel]:
            by_hand = grpc.aio.insecure_channel(target)
            return by_hand, intercept_channel(by_hand, StaticTokenSource(TOKEN))

        by_hand, ours = runner.run(channels())
        print(f"\ngrpc.aio, streams ({rounds} rounds of {messages} messages): messages per second, of by hand's")
        for label, call in (("server stream", watch), ("client stream", ingest), ("bidirectional stream", converse)):

            def run(
                channel: grpc.aio.Channel, metadata: Any, call: Callable[..., Coroutine[Any, Any, None]] = call
            ) -> Callable[[], None]:
                return lambda: runner.run(call(channel, metadata, messages))

            measured = paired({"by hand": run(by_hand, METADATA), "intercept_channel": run(ours, None)}, rounds)
            median, low, high = ratios(measured, "by hand", 1)["intercept_channel"]
            print(row(label, (1 / median, 1 / high, 1 / low)))
        runner.run(_closed(by_hand))


async def _closed(channel: grpc.aio.Channel) -> None:
    await channel.close()


async def watch(channel: grpc.aio.Channel, metadata: Any, messages: int) -> None:
    stub: Any = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
    async for _ in stub.WatchSession(heartbeat_pb2.WatchSessionRequest(max_messages=messages), metadata=metadata):
        pass


async def ingest(channel: grpc.aio.Channel, metadata: Any, messages: int) -> None:
    request = event_pb2.IngestEventsRequest(event=event_pb2.HookEvent(event_id="1"))
    stub: Any = event_pb2_grpc.EventServiceStub(channel)
    answer = await stub.IngestEvents((request for _ in range(messages)), metadata=metadata)
    assert answer.accepted == messages


async def converse(channel: grpc.aio.Channel, metadata: Any, messages: int) -> None:
    request = event_pb2.StreamHookEventsRequest(event=event_pb2.HookEvent(event_id="1"))
    stub: Any = event_pb2_grpc.EventServiceStub(channel)
    answers = 0
    async for _ in stub.StreamHookEvents((request for _ in range(messages)), metadata=metadata):
        answers += 1
    assert answers == messages

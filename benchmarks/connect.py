"""Connect: unary calls, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from benchmarks.grpc_sync import TOKEN
from benchmarks.measuring import paired, ratios, row
from interceptors import ConnectBearerInterceptor, StaticTokenSource
from interceptors.gen.kontext.agent.v1 import heartbeat_connect, heartbeat_pb2

HEADERS = {"authorization": f"Bearer {TOKEN}"}
REQUEST = heartbeat_pb2.HeartbeatRequest(session_id="bench", agent="bench", sequence=1)


class NoOp:
    def intercept_unary_sync(self, call_next, request, ctx, /):
        return call_next(request, ctx)

    async def intercept_unary(self, call_next, request, ctx, /):
        return await call_next(request, ctx)


def _variants() -> dict[str, tuple[list[Any], dict[str, str] | None]]:
    return {
        "headers by hand": ([], HEADERS),
        "headers by hand, another client": ([], HEADERS),
        "ConnectBearerInterceptor": ([ConnectBearerInterceptor(StaticTokenSource(TOKEN))], None),
        "a no-op interceptor, by hand": ([NoOp()], HEADERS),
    }


def unary(url: str, rounds: int, calls: int) -> None:
    def caller(interceptors: list[Any], headers: dict[str, str] | None) -> Callable[[], None]:
        client = heartbeat_connect.HeartbeatServiceClientSync(url, interceptors=interceptors, timeout_ms=10_000)

        def run() -> None:
            for _ in range(calls):
                client.heartbeat(REQUEST, headers=headers)

        return run

    _report("Connect sync", {name: caller(*variant) for name, variant in _variants().items()}, rounds, calls)


def unary_async(url: str, rounds: int, calls: int) -> None:
    with asyncio.Runner() as runner:

        def caller(interceptors: list[Any], headers: dict[str, str] | None) -> Callable[[], None]:
            client = heartbeat_connect.HeartbeatServiceClient(url, interceptors=interceptors, timeout_ms=10_000)

            async def run() -> None:
                for _ in range(calls):
                    await client.heartbeat(REQUEST, headers=headers)

            return lambda: runner.run(run())

        _report("Connect async", {name: caller(*variant) for name, variant in _variants().items()}, rounds, calls)


def _report(title: str, variants: dict[str, Callable[[], None]], rounds: int, calls: int) -> None:
    measured = paired(variants, rounds)
    print(f"\n{title}, unary ({rounds} rounds of {calls} calls): client CPU, wall time")
    cpu, wall = ratios(measured, "headers by hand", 0), ratios(measured, "headers by hand", 1)
    for name in measured:
        print(row(name, cpu[name], wall[name]))

"""The session itself: heartbeats, events, uploads and a conversation at the same time, on threads or on tasks."""

from __future__ import annotations

import asyncio
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from interceptors import TokenSource
    from interceptors.demo.calls import Calls
    from interceptors.demo.record import Record
    from interceptors.testing import FakeServer

_PAUSE_SECONDS: Final = 0.1
_BATCH: Final = 20

GRPC: Final = ("grpc", "aio")
_CONNECT: Final = ("connect", "connect-aio")
CONNECT_EXTRA: Final = "testing"


def flavours() -> tuple[str, ...]:
    """Those that can be shown: Connect needs a server that speaks it."""
    return (*GRPC, *_CONNECT) if find_spec("hypercorn") is not None else GRPC


def session(flavour: str, server: FakeServer, source: TokenSource, record: Record, stop: threading.Event) -> None:
    """Makes calls of one flavour until `stop` is set and the last of them has ended."""
    from interceptors.demo import calls

    if flavour == "grpc":
        with calls.GrpcCalls(server, source) as grpc_calls:
            _on_threads(_acts(flavour, grpc_calls, record), record, stop)
    elif flavour == "connect":
        with calls.ConnectCalls(server, source) as connect_calls:
            _on_threads(_acts(flavour, connect_calls, record), record, stop)
    else:
        kind = calls.AioCalls if flavour == "aio" else calls.ConnectAioCalls
        asyncio.run(_async_session(flavour, kind, server, source, record, stop))


async def _async_session(
    flavour: str, kind: Any, server: FakeServer, source: TokenSource, record: Record, stop: threading.Event
) -> None:
    async with kind(server, source) as calls:
        await _on_tasks(_acts(flavour, calls, record), record, stop)


def _acts(flavour: str, calls: Calls, record: Record) -> list[Callable[[], Any]]:
    """What is done again and again, each by a worker of its own."""

    def heartbeat() -> Any:
        return calls.heartbeat(record.new_id(f"{flavour}: heartbeat"))

    def event() -> Any:
        return calls.event(record.new_id(f"{flavour}: unary event"))

    def upload() -> Any:
        return calls.upload([record.new_id(f"{flavour}: uploaded event") for _ in range(_BATCH)])

    def converse() -> Any:
        return calls.converse([lambda: record.new_id(f"{flavour}: conversation")] * _BATCH)

    return [heartbeat, heartbeat, event, event, upload, converse]


def _on_threads(acts: list[Callable[[], Any]], record: Record, stop: threading.Event) -> None:
    def again_and_again(act: Callable[[], Any]) -> None:
        while not stop.wait(_PAUSE_SECONDS):
            with record.calling():
                act()

    threads = [threading.Thread(target=again_and_again, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def _on_tasks(acts: list[Callable[[], Awaitable[Any]]], record: Record, stop: threading.Event) -> None:
    async def again_and_again(act: Callable[[], Awaitable[Any]]) -> None:
        while not stop.is_set():
            await asyncio.sleep(_PAUSE_SECONDS)
            with record.calling():
                await act()

    async with asyncio.TaskGroup() as group:
        for act in acts:
            group.create_task(again_and_again(act))

"""The session itself, in each flavour: heartbeats, unary events, an upload, and a conversation."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, Final

from interceptors import authenticated_channel
from interceptors.gen.kontext.agent.v1 import event_pb2, event_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from interceptors import TokenSource
    from interceptors.demo.record import Record

_PAUSE: Final = 0.05
_BATCH: Final = 20
_DEADLINE: Final = 10.0


def _event(identifier: str) -> event_pb2.HookEvent:
    return event_pb2.HookEvent(event_id=identifier, hook_event_name="PreToolUse", tool_name="Read", tool_input=b"{}")


def grpc_session(target: str, source: TokenSource, record: Record, stop: threading.Event) -> None:
    """The grpc sync flavour: several threads over one channel."""
    with authenticated_channel(target, source) as channel:
        heartbeats = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
        events = event_pb2_grpc.EventServiceStub(channel)

        def heartbeat() -> None:
            with record.calling():
                identifier = record.new_id("grpc heartbeat")
                heartbeats.Heartbeat(heartbeat_pb2.HeartbeatRequest(session_id=identifier), timeout=_DEADLINE)

        def event() -> None:
            with record.calling():
                request = event_pb2.ProcessHookEventRequest(event=_event(record.new_id("grpc unary event")))
                events.ProcessHookEvent(request, timeout=_DEADLINE)

        def future() -> None:
            with record.calling():
                request = event_pb2.ProcessHookEventRequest(event=_event(record.new_id("grpc future event")))
                events.ProcessHookEvent.future(request, timeout=_DEADLINE).result()

        def upload() -> None:
            identifiers = [record.new_id("grpc uploaded event") for _ in range(_BATCH)]
            with record.calling():
                requests = (event_pb2.IngestEventsRequest(event=_event(identifier)) for identifier in identifiers)
                events.IngestEvents(requests, timeout=_DEADLINE)

        def converse() -> None:
            with record.calling():
                said: queue.SimpleQueue[Any] = queue.SimpleQueue()
                answers = events.StreamHookEvents(iter(said.get, None), timeout=_DEADLINE)
                for _ in range(_BATCH):
                    said.put(event_pb2.StreamHookEventsRequest(event=_event(record.new_id("grpc conversation"))))
                    next(answers)
                said.put(None)
                for _ in answers:
                    pass

        def again_and_again(act: Callable[[], None]) -> None:
            while not stop.wait(_PAUSE):
                act()

        workers = [heartbeat, heartbeat, event, event, future, upload, converse]
        threads = [threading.Thread(target=again_and_again, args=(act,)) for act in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


FLAVOURS: Final[dict[str, Callable[[str, TokenSource, Record, threading.Event], None]]] = {"grpc": grpc_session}

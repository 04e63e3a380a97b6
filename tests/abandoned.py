"""A server that sees when a client gives up a call."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from interceptors.gen.kontext.agent.v1 import event_pb2, event_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc


class Abandoned(heartbeat_pb2_grpc.HeartbeatServiceServicer, event_pb2_grpc.EventServiceServicer):
    def __init__(self):
        self.target = ""
        self.begun, self.ended = threading.Event(), threading.Event()

    def Heartbeat(self, request, context):  # noqa: N802 - gRPC's names, here and below
        context.add_callback(self.ended.set)
        self.begun.set()
        self.ended.wait(20)
        return heartbeat_pb2.HeartbeatResponse()

    def WatchSession(self, request, context):  # noqa: N802
        context.add_callback(self.ended.set)
        yield heartbeat_pb2.WatchSessionResponse(sequence=1)
        self.begun.set()
        self.ended.wait(20)

    def StreamHookEvents(self, request_iterator, context):  # noqa: N802
        context.add_callback(self.ended.set)
        for request in request_iterator:
            yield event_pb2.StreamHookEventsResponse(event_id=request.event.event_id)
            self.begun.set()


@contextmanager
def serving_the_abandoned():
    servicer = Abandoned()
    server = grpc.server(ThreadPoolExecutor(2))
    heartbeat_pb2_grpc.add_HeartbeatServiceServicer_to_server(servicer, server)
    event_pb2_grpc.add_EventServiceServicer_to_server(servicer, server)
    servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield servicer
    finally:
        servicer.ended.set()
        server.stop(None).wait()

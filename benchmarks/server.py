"""The one server process that every variant calls. Prints its port, ends with its standard input."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

from interceptors.gen.kontext.agent.v1 import event_pb2, event_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc
from interceptors.testing import FakeServer


class Heartbeats(heartbeat_pb2_grpc.HeartbeatServiceServicer):
    def Heartbeat(self, request, context):  # noqa: N802
        return heartbeat_pb2.HeartbeatResponse(sequence=request.sequence)

    def WatchSession(self, request, context):  # noqa: N802
        for sequence in range(request.max_messages):
            yield heartbeat_pb2.WatchSessionResponse(sequence=sequence)


class Events(event_pb2_grpc.EventServiceServicer):
    def IngestEvents(self, request_iterator, context):  # noqa: N802
        return event_pb2.IngestEventsResponse(accepted=sum(1 for _ in request_iterator))

    def StreamHookEvents(self, request_iterator, context):  # noqa: N802
        for request in request_iterator:
            yield event_pb2.StreamHookEventsResponse(event_id=request.event.event_id)


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    heartbeat_pb2_grpc.add_HeartbeatServiceServicer_to_server(Heartbeats(), server)
    event_pb2_grpc.add_EventServiceServicer_to_server(Events(), server)
    plain = server.add_insecure_port("127.0.0.1:0")
    local = server.add_secure_port("127.0.0.1:0", grpc.local_server_credentials())
    server.start()
    with FakeServer(verify=lambda _: None) as connect:
        print(plain, local, connect.url, flush=True)
        sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    main()

"""A program that runs for long: what the tests of several processes start many of."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict

import grpc

from interceptors import authenticated_channel, open_session
from interceptors.gen.kontext.agent.v1 import heartbeat_pb2, heartbeat_pb2_grpc


def run(store, issuer: str, client_id: str, target: str) -> None:
    """Heartbeats until stdin says something; says "ready" after the first one, and what became of them at the end."""
    asked = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), asked.set()), daemon=True).start()
    calls, failures = 0, []
    with (
        open_session(issuer, client_id, store=store) as source,
        authenticated_channel(target, source) as channel,
    ):
        stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
        while not asked.wait(0.05):
            try:
                stub.Heartbeat(heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=calls + 1), timeout=20)
            except grpc.RpcError as error:
                failures.append(f"{error.code()}: {error.details()} because of {error.__cause__!r}")
            calls += 1
            if calls == 1:
                _say("ready")
    _say(json.dumps({"calls": calls, "failures": failures, "stats": asdict(source.stats)}))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

"""The server that users test with, where it differs from any other: how it stops, what becomes of broken calls."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
from connect_drivers import CONNECT_WAYS, event
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from connectrpc.protocol import ProtocolType
from pyqwest import HTTPVersion, SyncClient, SyncHTTPTransport

from interceptors.gen.kontext.agent.v1 import event_connect, event_pb2, heartbeat_connect, heartbeat_pb2
from interceptors.testing import FakeServer

HEARTBEAT = heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=1)
ALL_WAYS = {**CONNECT_WAYS, "grpc_web-h2": (ProtocolType.GRPC_WEB, HTTPVersion.HTTP2)}


@contextmanager
def clients(url, way, *interceptors):
    """Clients of both services, over a connection of their own."""
    protocol, version = ALL_WAYS[way]
    with SyncHTTPTransport(http_version=version) as transport:
        options = {"protocol": protocol, "http_client": SyncClient(transport), "interceptors": interceptors}
        yield (
            heartbeat_connect.HeartbeatServiceClientSync(url, **options),
            event_connect.EventServiceClientSync(url, **options),
        )


def authorization(issuer):
    return {"authorization": f"Bearer {issuer.session().access_token}"}


def an_event(event_id):
    return event_pb2.StreamHookEventsRequest(event=event(event_id))


# Stopping


@pytest.mark.parametrize("side", ["url", "wsgi_url"])
@pytest.mark.parametrize("way", ["connect", "grpc"])
def test_it_stops_without_a_word_while_a_call_is_open(issuer, side, way, caplog):
    asked_enough = threading.Event()

    def requests():
        yield an_event(1)
        asked_enough.wait(10)

    # Given a call in which both sides have spoken
    with FakeServer(issuer) as server, clients(getattr(server, side), way) as (_, events):
        talk = events.stream_hook_events(requests(), headers=authorization(issuer))
        assert next(talk).event_id == "1"
        # When the server stops
        server.stop()
        # Then the call has ended, and nobody was alarmed
        with pytest.raises(ConnectError):
            next(talk)
        asked_enough.set()
    assert [record.getMessage() for record in caplog.records] == []


# Answering early


@pytest.mark.parametrize("side", ["url", "wsgi_url"])
@pytest.mark.parametrize("way", ["connect", "grpc", "grpc_web-h2"])
def test_a_refusal_is_heard_of_while_the_client_is_still_waiting_to_send(issuer, server, side, way):
    refused = threading.Event()

    # Given a client that says no more before it is answered
    def requests():
        yield an_event(1)
        refused.wait(10)
        yield an_event(2)

    server.refuse_next(after_messages=1, code="PERMISSION_DENIED")
    with clients(getattr(server, side), way) as (heartbeats, events):
        # When it is refused
        with pytest.raises(ConnectError) as caught:
            list(events.stream_hook_events(requests(), headers=authorization(issuer), timeout_ms=5_000))
        # Then it hears of it at once, and its connection lives on, whatever it still sends
        assert caught.value.code is Code.PERMISSION_DENIED
        refused.set()
        assert heartbeats.heartbeat(HEARTBEAT, headers=authorization(issuer)).sequence == 1


@pytest.mark.parametrize("side", ["url", "wsgi_url"])
def test_a_connection_is_good_for_more_than_a_thousand_calls_of_grpcs(issuer, server, side):
    headers = authorization(issuer)
    with clients(getattr(server, side), "grpc") as (heartbeats, _):
        for _ in range(1_010):
            heartbeats.heartbeat(HEARTBEAT, headers=headers)
    assert len(server.calls) == 1_010

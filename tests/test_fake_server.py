"""The server that users test with, where it differs from any other: how it stops, what becomes of broken calls."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager

import httpx
import pytest
from connect_drivers import CONNECT_WAYS, event
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from connectrpc.protocol import ProtocolType
from pyqwest import HTTPVersion, SyncClient, SyncHTTPTransport

from interceptors.gen.kontext.agent.v1 import event_connect, event_pb2, heartbeat_connect, heartbeat_pb2
from interceptors.testing import FakeIssuer, FakeServer

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


def test_starting_it_twice_is_starting_it_once(issuer):
    with FakeServer(issuer) as server:
        target = server.target
        assert server.start().target == target
    # It is the one server that has stopped: its port is free again
    with FakeServer(issuer) as another, server:
        assert server.target == target != another.target


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


# Clients that hang up


@pytest.mark.parametrize("side", ["url", "wsgi_url"])
@pytest.mark.parametrize("way", ["connect", "connect-h1", "grpc"])
def test_abandoned_watches_do_not_use_the_workers_up(issuer, side, way):
    with (
        FakeServer(issuer, max_workers=2) as server,
        clients(getattr(server, side), way) as (heartbeats, _),
    ):
        # Given more watches than there are workers, each left after a message
        for _ in range(5):
            watch = heartbeats.watch_session(
                heartbeat_pb2.WatchSessionRequest(session_id="s"), headers=authorization(issuer), timeout_ms=5_000
            )
            next(watch)
            watch.close()
        # When a call comes
        answer = heartbeats.heartbeat(HEARTBEAT, headers=authorization(issuer), timeout_ms=5_000)
        # Then it is answered
        assert answer.sequence == 1


@pytest.mark.parametrize("way", ["connect", "connect-h1", "grpc"])
def test_a_watch_for_many_messages_ends_with_its_client(issuer, way):
    with FakeServer(issuer, max_workers=1) as server, clients(server.wsgi_url, way) as (heartbeats, _):
        # Given somebody who wants messages without end, and leaves after one
        request = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=2**31 - 1)
        watch = heartbeats.watch_session(request, headers=authorization(issuer))
        next(watch)
        watch.close()
        # Then the only worker is free for a call
        assert heartbeats.heartbeat(HEARTBEAT, headers=authorization(issuer), timeout_ms=10_000).sequence == 1
        assert [call.method for call in server.calls] == ["Heartbeat"]


@pytest.mark.parametrize("way", ["connect", "connect-h1", "grpc", "grpc_web"])
def test_a_stream_that_is_cut_short_is_not_executed(issuer, way):
    with FakeServer(issuer, max_workers=1) as server, clients(server.wsgi_url, way) as (heartbeats, events):

        def requests():
            yield event_pb2.IngestEventsRequest(event=event(1))
            server.wait_for(lambda: server.attempts == 1)
            msg = "there are no more"
            raise ValueError(msg)

        # Given a client that gives up within its stream
        with pytest.raises((ConnectError, ValueError)):
            events.ingest_events(requests(), headers=authorization(issuer))
        # When the server's only worker is free again
        heartbeats.heartbeat(HEARTBEAT, headers=authorization(issuer))
        # Then what was sent of the stream has not been executed
        assert [call.method for call in server.calls] == ["Heartbeat"]


# What cannot be


@pytest.mark.parametrize("code", ["NO_SUCH", "OK", "unavailable"])
def test_refusing_with_what_is_no_error_status_is_itself_refused_at_once(server, code):
    with pytest.raises(ValueError, match="UNAVAILABLE"):
        server.refuse_next(code=code)


def test_a_websocket_is_refused_without_alarm(server, caplog):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}
    answer = httpx.get(server.url, headers=upgrade)
    assert answer.status_code == 403
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_where_they_are_is_not_told_before_they_are_there():
    with pytest.raises(RuntimeError, match="not running: use it as a context manager"):
        _ = FakeIssuer().url
    with FakeIssuer() as issuer:
        with pytest.raises(RuntimeError, match="not running: use it as a context manager"):
            _ = FakeServer(issuer).target
        with pytest.raises(RuntimeError, match="not running: use it as a context manager"):
            _ = FakeServer(issuer).url

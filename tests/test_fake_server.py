"""The server that users test with, where it differs from any other: how it stops, what becomes of broken calls."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
from connect_drivers import CONNECT_WAYS, event
from connectrpc.errors import ConnectError
from pyqwest import SyncClient, SyncHTTPTransport

from interceptors.gen.kontext.agent.v1 import event_connect, event_pb2, heartbeat_connect
from interceptors.testing import FakeServer


@contextmanager
def clients(url, way, *interceptors):
    """Clients of both services, over a connection of their own."""
    protocol, version = CONNECT_WAYS[way]
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

"""From a stored login to calls, in one line; and what a program's user is told of a refresh."""

from __future__ import annotations

import io
import sys
from datetime import timedelta

import pytest
from keyring_backends import FileKeyring

from interceptors import (
    FileStore,
    KeyringStore,
    LoginRequired,
    MemoryStore,
    Session,
    StoreError,
    announce_refresh,
    authenticated_channel,
    open_session,
)
from interceptors.gen.kontext.agent.v1 import heartbeat_pb2, heartbeat_pb2_grpc


@pytest.fixture
def stored_keyring(tmp_path, monkeypatch):
    import keyring

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    previous = keyring.get_keyring()
    keyring.set_keyring(FileKeyring(tmp_path / "keyring.json"))
    yield KeyringStore()
    keyring.set_keyring(previous)


def test_a_stored_session_serves_calls(issuer, server):
    store = MemoryStore(issuer.session())
    with (
        open_session(issuer.url, issuer.client_id, store=store) as source,
        authenticated_channel(server.target, source) as channel,
    ):
        stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
        issuer.revoke(store.load().access_token)
        assert stub.Heartbeat(heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=1), timeout=10).sequence == 1
    assert issuer.refreshes == 1


def test_the_keyring_is_where_it_looks_if_nobody_says(issuer, stored_keyring):
    session = issuer.session()
    stored_keyring.save(session)
    with open_session(issuer.url, issuer.client_id) as source:
        assert source.token() == session.token


def test_opening_makes_no_request(issuer):
    open_session(issuer.url, issuer.client_id, store=MemoryStore(issuer.session())).close()
    assert issuer.requests == []


def test_without_a_session_it_says_to_log_in(issuer):
    with pytest.raises(LoginRequired, match=r'run "interceptors login"'):
        open_session(issuer.url, issuer.client_id, store=MemoryStore())


@pytest.mark.parametrize(
    ("issuer_url", "client_id"), [("https://other.example.com", "test-client"), ("https://login.example.com", "other")]
)
def test_a_session_of_another_issuer_or_client_is_not_used(issuer_url, client_id):
    session = Session(
        access_token="a", issued_at=1.0, issuer="https://login.example.com", client_id="test-client", refresh_token="r"
    )
    with pytest.raises(LoginRequired, match="belongs to client test-client at "):
        open_session(issuer_url, client_id, store=MemoryStore(session))


def test_a_store_that_cannot_be_read_is_named(tmp_path, issuer):
    path = tmp_path / "session.json"
    path.touch(mode=0o600)
    path.write_text("rubbish")
    with pytest.raises(StoreError, match=str(path)):
        open_session(issuer.url, issuer.client_id, store=FileStore(path))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"issuer": "http://login.example.com"}, ValueError),
        ({"client_id": ""}, ValueError),
        ({"store": "keyring"}, TypeError),
        ({"window": timedelta(minutes=-1)}, ValueError),
        ({"window": 900}, TypeError),
        ({"on_refresh": "print"}, TypeError),
        ({"timeout": 0}, ValueError),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_at_once(arguments, error):
    good = {"issuer": "https://login.example.com", "client_id": "c", "store": MemoryStore()}
    with pytest.raises(error):
        open_session(**{**good, **arguments})


def test_a_refresh_is_announced_where_the_application_asks_for_it(issuer, capsys):
    store = MemoryStore(issuer.session())
    with open_session(issuer.url, issuer.client_id, store=store, on_refresh=announce_refresh) as source:
        source.reject(source.token())
        source.token()
    assert capsys.readouterr().err == "✓ Token refreshed\n"


def test_a_console_without_the_sign_gets_the_words(monkeypatch, issuer):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")  # as stderr is
    monkeypatch.setattr(sys, "stderr", console)
    announce_refresh(issuer.session())
    assert console.buffer.getvalue() == b"Token refreshed\n"


def test_a_program_without_a_console_is_not_disturbed(monkeypatch, issuer):
    monkeypatch.setattr(sys, "stderr", None)
    announce_refresh(issuer.session())

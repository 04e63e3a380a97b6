"""What every place that keeps a session has to do."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_places import PLACES, process

from interceptors import Session, StoreError

SESSION = Session(
    access_token="access",
    issued_at=1_800_000_000.0,
    expires_at=1_800_003_600.5,
    refresh_token="refresh",
    id_token="id",
    scope="openid",
    issuer="https://login.example.com",
    client_id="cli",
    subject="1",
    name="Ada Läufer",
    email="ada@example.com",
)
LONG = dataclasses.replace(SESSION, access_token="a" * 9000, id_token="i" * 5000)


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        # A store in memory is its process' alone.
        places = [name for name in PLACES if name != "memory" or "shared" not in metafunc.fixturenames]
        metafunc.parametrize("place", places, indirect=True)


@pytest.fixture
def place(request, tmp_path):
    with PLACES[request.param](tmp_path) as place:
        yield place


@pytest.fixture
def store(place):
    return place.store()


@pytest.fixture
def shared(place):
    """A place that several processes share."""
    return place


def test_there_is_nothing_at_first(store):
    assert store.load() is None
    store.clear()
    assert store.load() is None


@pytest.mark.parametrize("session", [SESSION, LONG], ids=["short", "long"])
def test_what_is_saved_is_loaded_by_everybody(place, store, session):
    store.save(session)
    assert store.load() == place.store().load() == session


def test_the_latest_session_counts_and_nothing_is_left_of_those_before(store):
    for session in (LONG, SESSION, dataclasses.replace(LONG, scope="x" * 3000), LONG, SESSION):
        store.save(session)
        assert store.load() == session
    store.clear()
    assert store.load() is None


TOKENS = st.text("abcXYZ019-._~+/", min_size=1, max_size=3000)
TEXTS = st.none() | st.text(max_size=200)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Session,
        access_token=TOKENS,
        issued_at=st.floats(0, 1e11),
        expires_at=st.none() | st.floats(0, 1e11),
        refresh_token=st.none() | TOKENS,
        name=TEXTS,
        email=TEXTS,
        scope=TEXTS,
    )
)
def test_any_session_comes_back_as_it_was(store, session):
    store.save(session)
    assert store.load() == session


def test_only_sessions_are_saved(store):
    with pytest.raises(TypeError, match="must be a Session"):
        store.save({"access_token": "x"})


@pytest.mark.parametrize("content", ["", "rubbish", "{}", "[1]", '{"version":1,"session":{"access_token":5}}'])
def test_damaged_content_is_an_error_that_names_the_place_and_the_way_out(shared, store, content):
    shared.corrupt(content)
    with pytest.raises(StoreError) as caught:
        store.load()
    assert str(store) in str(caught.value)
    assert "interceptors login" in str(caught.value)
    store.save(SESSION)
    assert store.load() == SESSION


def test_what_a_newer_release_has_written_is_refused_politely(shared, store):
    shared.corrupt(json.dumps({"version": 99, "session": {}}))
    with pytest.raises(StoreError, match="upgrade interceptors"):
        store.load()


def test_neither_repr_nor_errors_show_a_token(shared, store):
    store.save(SESSION)
    assert "access" not in f"{store!r} {store}"
    shared.corrupt('{"version":1,"session":{"access_token":"s3cret","issued_at":"s3cret"}}')
    with pytest.raises(StoreError) as caught:
        store.load()
    assert "s3cret" not in f"{caught.value!r} {caught.value} {caught.value.__cause__}"


# The lock


def test_one_thread_at_a_time_holds_the_lock(place):
    inside, most = [], []

    def work(_):
        with place.store().lock(30):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert max(most) == 1


def test_who_waits_too_long_for_the_lock_is_told(place, store):
    with store.lock(), pytest.raises(StoreError, match="locked by another"), place.store().lock(0.05):
        pass
    with store.lock(0):
        pass


def test_sessions_can_be_read_and_written_while_the_lock_is_held(place, store):
    with store.lock():
        store.save(SESSION)
        assert store.load() == SESSION
        answer = []
        thread = threading.Thread(target=lambda: answer.append(place.store().load()))
        thread.start()
        thread.join(10)
        assert answer == [SESSION]
        store.clear()
        store.save(LONG)
        store.save(SESSION)
    assert store.load() == SESSION


def test_the_lock_keeps_other_processes_out(shared, store):
    holder = process(shared, "with store.lock():\n print('held', flush=True)\n input()")
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError), store.lock(0.1):
            pass
        holder.communicate("\n", timeout=20)
        with store.lock(20):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_of_a_killed_process_is_free_at_once(shared, store, request):
    holder = process(shared, "with store.lock():\n print('held', flush=True)\n input()")
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    if "redis" in request.node.name:
        # Over hosts, nobody can tell a dead holder from a slow one: the lock ends by itself.
        with pytest.raises(StoreError), store.lock(0.05):
            pass
        return
    with store.lock(1):
        pass


# Writers that die, readers at the same time


def test_a_writer_that_is_killed_leaves_a_whole_session(shared, store):
    script = """
import dataclasses, itertools
base = Session(access_token='a' * 4000, issued_at=1.0, refresh_token='r' * 2000)
print('ready', flush=True)
for i in itertools.count():
    store.save(dataclasses.replace(base, scope=str(i) * (i % 3000)))
"""
    for milliseconds in (1, 7, 20):
        writer = process(shared, script)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(milliseconds / 1000)
        writer.kill()
        writer.communicate()
        session = store.load()
        assert session in (None, SESSION) or len(session.access_token) == 4000
        store.save(SESSION)
        assert store.load() == SESSION


def test_readers_see_one_whole_session_or_another(shared, store):
    script = """
import itertools
long = Session(access_token='a' * 5000, issued_at=1.0, refresh_token='a' * 3000)
short = Session(access_token='b', issued_at=1.0, refresh_token='b')
store.save(long)
print('ready', flush=True)
while True:
    store.save(short); store.save(long)
"""
    writer = process(shared, script)
    try:
        assert writer.stdout.readline() == "ready\n"
        for _ in range(50):
            session = shared.store().load()
            assert session.refresh_token in {"b", "a" * 3000}
            assert session.access_token[0] == session.refresh_token[0]
    finally:
        writer.kill()
        writer.communicate()

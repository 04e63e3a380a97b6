"""What only Redis does: it is down, is asked by stopped processes, and speaks bytes or text."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry
from store_places import a_redis
from test_store_contract import LONG, SESSION

from interceptors import RedisStore, StoreError
from interceptors.stores import redis as redis_store


@pytest.fixture
def place(tmp_path):
    with a_redis(tmp_path) as place:
        yield place


def test_clients_that_decode_and_clients_that_do_not(place):
    bytes_, text = place.store(), place.store(decode_responses=True)
    with text.lock():
        text.save(LONG)
    assert bytes_.load() == text.load() == LONG
    with bytes_.lock():
        bytes_.save(SESSION)
    assert text.load() == SESSION


@pytest.mark.parametrize("decode", [False, True])
def test_content_that_is_no_text_is_damaged_for_both(place, decode):
    with redis.Redis(port=place.port) as client:
        client.hset("session", "session", b"\xff\xfe{}")
    with pytest.raises(StoreError, match="it is damaged: delete the key"):
        place.store(decode_responses=decode).load()


def test_a_holder_who_has_lost_the_lock_does_not_overwrite_what_is_newer(place):
    late, other = place.store(), place.store()
    newer = dataclasses.replace(SESSION, refresh_token="newer")
    with late.lock():
        assert late.load() is None
        with redis.Redis(port=place.port) as client:
            client.delete("session:lock")  # as if it had been stopped for too long
        with other.lock():
            other.save(newer)
        with pytest.raises(StoreError, match="the lock was lost"):
            late.save(SESSION)
    assert other.load() == newer
    late.save(SESSION)  # without the lock, as a login may
    assert other.load() == SESSION


def test_a_logout_meanwhile_is_not_overwritten_either(place):
    late, other = place.store(), place.store()
    late.save(SESSION)
    with late.lock():
        late.load()
        other.clear()
        with pytest.raises(StoreError, match="the lock was lost"):
            late.save(LONG)
    assert other.load() is None


def test_the_lock_is_renewed_for_as_long_as_it_is_held(place, monkeypatch):
    monkeypatch.setattr(redis_store, "_LOCK_SECONDS", 0.3)
    store = place.store()
    with store.lock():
        threading.Event().wait(0.9)
        with pytest.raises(StoreError), place.store().lock(0):
            pass
    with place.store().lock(0):
        pass


def test_a_renewal_that_fails_for_a_moment_does_not_lose_the_lock(place, monkeypatch):
    monkeypatch.setattr(redis_store, "_LOCK_SECONDS", 1.5)
    tried = threading.Semaphore(0)
    reacquire = redis.lock.Lock.reacquire

    def dropped_once(lock):
        monkeypatch.setattr(redis.lock.Lock, "reacquire", renewed)
        raise redis.ConnectionError("connection reset by peer")

    def renewed(lock):
        assert reacquire(lock)
        tried.release()

    monkeypatch.setattr(redis.lock.Lock, "reacquire", dropped_once)
    with place.store().lock():
        assert tried.acquire(timeout=20)
        assert tried.acquire(timeout=20)
        assert tried.acquire(timeout=20)  # by now the lock would have ended
        with pytest.raises(StoreError), place.store().lock(0):
            pass


def test_the_lock_of_a_dead_holder_ends_by_itself(place, monkeypatch):
    monkeypatch.setattr(redis_store, "_LOCK_SECONDS", 0.3)
    monkeypatch.setattr(redis_store, "_renew", lambda *_: None)
    dead = place.store().lock()
    dead.__enter__()
    with place.store().lock(10):
        pass


def test_redis_that_is_down_is_an_error_that_says_so(tmp_path):
    with redis.Redis(port=1, retry=Retry(NoBackoff(), 0)) as client:
        store = RedisStore(client, "session")
        for act in (store.load, lambda: store.save(SESSION), store.clear, lambda: store.lock(1).__enter__()):
            with pytest.raises(StoreError, match="see that Redis is up"):
                act()


@pytest.mark.parametrize(
    ("client", "key", "error"),
    [
        ("redis://localhost", "k", TypeError),
        (redis.asyncio.Redis(), "k", TypeError),
        (redis.Redis(), "", ValueError),
        (redis.Redis(), None, TypeError),
    ],
)
def test_bad_arguments(client, key, error):
    with pytest.raises(error):
        RedisStore(client, key)

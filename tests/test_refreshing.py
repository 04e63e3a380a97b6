"""The rules for the source, one after the other, with a clock that stands still and an issuer that is a function."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
from conftest import FakeClock, eventually, session_of

from interceptors import (
    FileStore,
    LoginRequired,
    MemoryStore,
    RefreshError,
    RefreshingTokenSource,
    StoreError,
    Token,
)


class Issuer:
    """Answers refreshes as it is told; counts them, and what was presented."""

    def __init__(self, clock, lifetime=3600.0):
        self.clock = clock
        self.lifetime = lifetime
        self.asked = []
        self.error = None
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, session):
        self.asked.append(session)
        issued_at = self.clock()
        self.entered.release()
        assert self.open.wait(20)
        if self.error is not None:
            raise self.error
        return session_of(f"t{len(self.asked)}", issued_at, self.lifetime)

    @property
    def count(self):
        return len(self.asked)


@pytest.fixture
def oidc(clock):
    return Issuer(clock)


@pytest.fixture
def store(clock):
    return MemoryStore(session_of("t0", clock()))


@pytest.fixture
def source(store, oidc, clock):
    with RefreshingTokenSource(store, oidc, clock=clock, jitter=lambda: 0.0) as source:
        yield source
        oidc.open.set()


class Raises:
    def __enter__(self):
        raise AssertionError("a lock was taken")

    def __exit__(self, *exc):
        return None


def test_rule_1_a_fresh_token_is_handed_out_without_lock_or_io(source, store, monkeypatch):
    assert source.peek() is None, "nothing was loaded yet, and peek does no I/O"
    token = source.token()
    monkeypatch.setattr(source, "_lock", Raises())
    monkeypatch.setattr(store, "load", lambda: pytest.fail("the store was read"))
    assert source.peek() is source.token() is token
    monkeypatch.undo()


def test_rule_2_inside_the_window_one_background_refresh_runs_and_nobody_waits(source, oidc, clock):
    source.token()
    oidc.open.clear()
    clock.advance(3600 - 900 + 1)
    tokens = {source.peek().value for _ in range(1000)} | {source.token().value for _ in range(1000)}
    assert tokens == {"t0"}
    assert oidc.entered.acquire(timeout=10)
    assert {source.peek().value for _ in range(1000)} == {"t0"}
    oidc.open.set()
    eventually(lambda: source.peek().value == "t1")
    assert oidc.count == 1
    assert source.stats.proactive == 1


def test_rule_2_the_window_is_a_quarter_of_a_short_lifetime(clock):
    oidc = Issuer(clock, lifetime=8.0)
    with RefreshingTokenSource(
        MemoryStore(session_of("t0", clock(), 8.0)), oidc, clock=clock, jitter=lambda: 0
    ) as source:
        for _ in range(59):
            assert source.token().value == source.peek().value
            clock.advance(0.1)
        assert oidc.count == 0
        clock.advance(0.2)
        source.token()
        eventually(lambda: source.peek() and source.peek().value == "t1")


def test_rule_2_jitter_shortens_the_window_by_a_tenth_at_most(store, oidc, clock):
    with RefreshingTokenSource(store, oidc, clock=clock, jitter=lambda: 0.999) as source:
        source.token()
        clock.advance(3600 - 900 + 1)
        source.token()
        assert oidc.count == 0
        clock.advance(90)
        source.token()
        eventually(lambda: oidc.count == 1)


def test_rule_3_callers_wait_when_the_token_is_about_to_expire(source, oidc, clock):
    source.token()
    clock.advance(3600 - 29)
    assert source.peek() is None
    assert source.token().value == "t1"
    assert source.stats.mandatory == 1


def test_rule_4_two_hundred_threads_wait_for_one_refresh(source, oidc, clock):
    source.token()
    clock.advance(3600)
    oidc.open.clear()
    with ThreadPoolExecutor(200) as pool:
        futures = [pool.submit(source.token) for _ in range(200)]
        assert oidc.entered.acquire(timeout=10)
        oidc.open.set()
        assert {future.result(10).value for future in futures} == {"t1"}
    assert oidc.count == 1


def test_rule_4_each_caller_waits_no_longer_than_its_own_deadline(source, oidc, clock):
    source.token()
    clock.advance(3600)
    oidc.open.clear()
    with pytest.raises(TimeoutError):
        source.token(timeout=0.01)
    oidc.open.set()
    assert source.token(timeout=10).value == "t1"
    assert oidc.count == 1, "the refresh that one caller gave up serves the next"


def test_rule_4_another_process_refresh_is_adopted_under_the_lock(source, store, oidc, clock):
    source.token()
    clock.advance(3600)
    store.save(session_of("from-elsewhere", clock()))
    assert source.token().value == "from-elsewhere"
    assert (oidc.count, source.stats.adoptions) == (0, 1)


def test_rule_5_a_session_is_saved_before_anyone_gets_its_token(source, store, oidc, clock, monkeypatch):
    source.token()
    clock.advance(3600)
    seen = []
    save = store.save
    monkeypatch.setattr(store, "save", lambda session: (seen.append(source.peek()), save(session)))
    token = source.token()
    assert seen == [None]
    assert store.load().token == token


def test_rule_5_when_saving_fails_it_warns_once_and_tries_again(source, store, oidc, clock, monkeypatch, caplog):
    source.token()
    save = store.save
    failing = True

    def maybe(session):
        if failing:
            raise StoreError("the disk is full")
        save(session)

    monkeypatch.setattr(store, "save", maybe)
    clock.advance(3600)
    with caplog.at_level(logging.WARNING, "interceptors"):
        assert source.token().value == "t1"
        clock.advance(3600)
        assert source.token().value == "t2", "the refresh token lives on in memory"
    assert oidc.asked[1].access_token == "t1"
    assert len(caplog.records) == 1
    assert "disk is full" in caplog.text
    failing = False
    clock.advance(3600)
    assert source.token().value == "t3"
    assert store.load().access_token == "t3"


def test_rule_5_what_could_not_be_saved_is_saved_on_close(store, oidc, clock, monkeypatch):
    save, failing = store.save, [True]
    monkeypatch.setattr(store, "save", lambda s: (_ for _ in ()).throw(StoreError("no")) if failing[0] else save(s))
    with RefreshingTokenSource(store, oidc, clock=clock) as source:
        clock.advance(3600)
        source.token()
        failing[0] = False
    assert store.load().access_token == "t1"


def test_rule_5_a_newer_login_is_not_overwritten_by_a_late_save(store, oidc, clock, monkeypatch):
    save, failing = store.save, [True]
    monkeypatch.setattr(store, "save", lambda s: (_ for _ in ()).throw(StoreError("no")) if failing[0] else save(s))
    with RefreshingTokenSource(store, oidc, clock=clock) as source:
        clock.advance(3600)
        source.token()
        failing[0] = False
        save(session_of("new-login", clock()))
    assert store.load().access_token == "new-login"


def test_rule_6_nobody_notices_a_passing_failure_while_the_token_works(source, oidc, clock):
    source.token()
    oidc.error = RefreshError("down")
    clock.advance(3600 - 800)
    assert source.token().value == "t0"
    eventually(lambda: source.stats.failures == 1)
    assert source.token().value == "t0"
    clock.advance(780)  # due, and in back-off or after it
    assert source.token().value == "t0"


def test_rule_6_afterwards_callers_get_a_refresh_error_quickly(source, oidc, clock):
    source.token()
    oidc.error = RefreshError("the issuer is down")
    clock.advance(3600)
    for _ in range(100):
        with pytest.raises(RefreshError, match="issuer is down"):
            source.token()
    assert oidc.count == 1, "the back-off holds"
    clock.advance(60)
    oidc.error = None
    assert source.token().value == "t2"


def test_rule_6_retry_after_is_obeyed(source, oidc, clock):
    source.token()
    oidc.error = RefreshError("slow down", retry_after=120.0)
    clock.advance(3600)
    for seconds in (0, 60, 59):
        clock.advance(seconds)
        with pytest.raises(RefreshError):
            source.token()
    assert oidc.count == 1
    oidc.error = None
    clock.advance(2)
    assert source.token().value == "t2"


def test_rule_6_the_back_off_grows_and_is_capped(source, oidc, clock):
    source.token()
    oidc.error = RefreshError("down")
    clock.advance(3600)
    for _ in range(3600):
        with pytest.raises(RefreshError):
            source.token()
        clock.advance(1)
    assert 3600 / 31 <= oidc.count <= 140


@pytest.mark.parametrize("error", [ValueError("odd t0ken"), KeyError("odd"), SystemExit(1)])
def test_rule_6_an_odd_exception_counts_as_passing_and_its_text_is_not_shown(source, oidc, clock, error):
    source.token()
    oidc.error = error
    clock.advance(3600)
    with pytest.raises(RefreshError) as caught:
        source.token()
    assert "odd" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_rule_6_a_dead_session_is_remembered_until_the_store_changes(source, store, oidc, clock):
    source.token()
    oidc.error = LoginRequired('run "interceptors login"')
    clock.advance(3600)
    for _ in range(50):
        with pytest.raises(LoginRequired):
            source.token()
        clock.advance(1000)
    assert oidc.count == 1
    store.save(session_of("new-login", clock()))
    assert source.token().value == "new-login", "a login in another terminal heals within one call"
    assert oidc.count == 1


def test_rule_6_a_login_heals_also_while_the_old_token_still_works(source, store, oidc, clock):
    source.token()
    oidc.error = LoginRequired("ended")
    clock.advance(3600 - 800)
    source.token()
    eventually(lambda: source.stats.failures == 1)
    store.save(session_of("new-login", clock()))
    clock.advance(1.1)
    eventually(lambda: (source.peek() or source.token()).value == "new-login")


def test_rule_6_a_session_saved_during_the_refusal_is_adopted(source, store, oidc, clock):
    source.token()
    clock.advance(3600)
    oidc.error = LoginRequired("reused")
    oidc.open.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(source.token)
        assert oidc.entered.acquire(timeout=10)
        store.save(session_of("saved-without-the-lock", clock()))
        oidc.open.set()
        assert waiting.result(10).value == "saved-without-the-lock"


def test_a_logout_elsewhere_asks_for_a_login(store, clock):
    def refresh(session):
        assert session is None
        raise LoginRequired('run "interceptors login"')

    with RefreshingTokenSource(store, refresh, clock=clock) as source:
        source.token()
        store.clear()
        clock.advance(3600)
        with pytest.raises(LoginRequired, match="interceptors login"):
            source.token()


def test_a_rejected_token_is_not_handed_out_again(source, oidc):
    token = source.token()
    source.reject(token)
    assert source.peek() is None
    assert source.token().value == "t1"
    assert source.stats.reactive == 1


def test_a_thousand_rejections_of_one_token_cost_one_refresh(source, oidc):
    token = source.token()
    with ThreadPoolExecutor(50) as pool:
        values = set(pool.map(lambda _: (source.reject(token), source.token().value)[1], range(1000)))
    assert values == {"t1"}
    assert (oidc.count, source.stats.rejected) == (1, 1)


def test_rejecting_a_token_that_was_replaced_changes_nothing(source, oidc):
    old = source.token()
    source.reject(old)
    new = source.token()
    source.reject(old)
    source.reject(Token("never-seen"))
    assert source.peek() == new


def test_in_back_off_a_refused_but_unexpired_token_is_handed_out(source, oidc):
    token = source.token()
    oidc.error = RefreshError("down")
    source.reject(token)
    assert source.token() == token
    assert source.token() == token
    assert oidc.count == 1


def test_rule_7_a_server_that_refuses_everything_costs_a_bounded_number_of_refreshes(source, oidc, clock):
    for _ in range(3600 * 2):
        source.reject(source.token())
        clock.advance(0.5)
    assert 3 <= oidc.count <= 25, "doubling from 1 s to 5 min: about twenty in an hour"


def test_rule_7_the_cool_down_hands_out_what_was_refused(source, oidc):
    source.reject(source.token())
    forced = source.token()
    source.reject(forced)
    assert source.peek() == source.token() == forced
    assert oidc.count == 1


def test_rule_7_tokens_that_a_server_has_accepted_do_not_count(source, oidc):
    for _ in range(20):
        source.reject(source.token())
        source.accept(source.token())
    assert oidc.count == 20


def test_rule_8_a_laptop_that_slept_notices_on_its_first_call(source, oidc, clock):
    source.token()
    clock.advance(86400)
    assert source.peek() is None
    assert source.token().value == "t1"


def test_a_token_that_has_expired_on_arrival_is_an_error_and_its_session_is_kept(store, oidc, clock):
    oidc.lifetime = 0.0
    with RefreshingTokenSource(store, oidc, clock=clock) as source:
        clock.advance(3600)
        with pytest.raises(RefreshError, match="clock"):
            source.token()
        assert store.load().access_token == "t1"


def test_a_store_that_cannot_be_read_is_an_error_that_passes(store, oidc, clock, monkeypatch):
    with RefreshingTokenSource(store, oidc, clock=clock) as source:
        with monkeypatch.context() as patch:
            patch.setattr(store, "load", lambda: (_ for _ in ()).throw(StoreError("the keyring is locked")))
            with pytest.raises(StoreError, match="locked"):
                source.token()
        clock.advance(60)
        assert source.token().value == "t0"


def test_a_lock_that_cannot_be_had_is_an_error_that_passes(source, store, oidc, clock, monkeypatch):
    @contextmanager
    def lock(timeout=None):
        raise StoreError("locked by another process")
        yield

    source.token()
    clock.advance(3600)
    with monkeypatch.context() as patch:
        patch.setattr(store, "lock", lock)
        with pytest.raises(StoreError):
            source.token()
    assert oidc.count == 0
    clock.advance(60)
    assert source.token().value == "t1"


def test_on_refresh_is_told_on_the_sources_thread_and_may_fail(store, oidc, clock, caplog):
    told = []

    def on_refresh(session):
        told.append((session.access_token, threading.current_thread() is threading.main_thread()))
        raise ValueError

    with RefreshingTokenSource(store, oidc, clock=clock, on_refresh=on_refresh) as source:
        clock.advance(3600)
        assert source.token().value == "t1"
        eventually(lambda: "on_refresh failed" in caplog.text)
    assert told == [("t1", False)]


def test_a_closed_source_says_so_once_its_token_is_used_up(store, oidc, clock):
    source = RefreshingTokenSource(store, oidc, clock=clock)
    source.token()
    source.close()
    source.close()
    assert source.token().value == "t0"
    clock.advance(3600)
    with pytest.raises(RefreshError, match="closed"):
        source.token()


def test_closing_waits_for_a_refresh_under_way(store, oidc, clock):
    source = RefreshingTokenSource(store, oidc, clock=clock)
    clock.advance(3600)
    oidc.open.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(source.token)
        assert oidc.entered.acquire(timeout=10)
        closing = pool.submit(source.close)
        oidc.open.set()
        closing.result(10)
        assert waiting.result(10).value == "t1"
    assert store.load().access_token == "t1"


def test_a_source_that_is_left_behind_is_collected_and_its_thread_ends(store, oidc, clock):
    source = RefreshingTokenSource(store, oidc, clock=clock)
    source.token()
    thread, gone = source._thread, weakref.ref(source)
    del source
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


def test_a_program_that_ends_during_a_refresh_saves_it_first(tmp_path):
    script = f"""
import threading, time
from interceptors import FileStore, RefreshingTokenSource, Session
began = threading.Event()
def refresh(session):
    began.set()
    time.sleep(0.3)
    return Session(access_token="saved", issued_at=time.time(), expires_at=time.time() + 60)
source = RefreshingTokenSource(FileStore({str(tmp_path / "session.json")!r}), refresh)
threading.Thread(target=source.token, daemon=True).start()
began.wait()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert FileStore(tmp_path / "session.json").load().access_token == "saved"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_rule_9_a_forked_child_has_a_usable_source():
    script = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore")
from interceptors import MemoryStore, RefreshingTokenSource, Session
def session(name): return Session(access_token=name, issued_at=time.time(), expires_at=time.time() + 3600)
began, go_on = threading.Event(), threading.Event()
parent = os.getpid()
def refresh(old):
    if os.getpid() == parent:
        began.set(); go_on.wait(20)
    return session("refreshed")
source = RefreshingTokenSource(MemoryStore(session("first")), refresh)
source.reject(source.token())
threading.Thread(target=source.token).start()
began.wait()
with source._lock:
    child = os.fork()
if child == 0:
    os._exit(0 if source.token(timeout=10).value == "refreshed" else 1)
status = os.waitpid(child, 0)[1]
go_on.set()
assert source.token().value == "refreshed"
sys.exit(os.waitstatus_to_exitcode(status))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((None, print), TypeError, "SessionStore"),
        ((MemoryStore(), None), TypeError, "callable"),
        ((MemoryStore(), print, timedelta(-1)), ValueError, "negative"),
        ((MemoryStore(), print, 900), TypeError, "timedelta"),
    ],
)
def test_bad_input_says_what_was_expected(arguments, error, says):
    store, refresh, *window = arguments
    with pytest.raises(error, match=says):
        RefreshingTokenSource(store, refresh, **({"window": window[0]} if window else {}))


def test_no_log_and_no_error_shows_a_token(caplog):
    clock = FakeClock()
    answers = iter([session_of("s3cret-1", clock()), ValueError("s3cret-2"), LoginRequired("ended")])

    def refresh(session):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    shown = []
    with (
        caplog.at_level(logging.DEBUG),
        RefreshingTokenSource(MemoryStore(session_of("s3cret-0", clock())), refresh, clock=clock) as source,
    ):
        for _ in range(4):
            try:
                shown.append(repr(source.token()))
            except Exception as error:
                shown.append(f"{error!r} {error}")
            clock.advance(4000)
        shown += [repr(source), repr(source.stats), repr(source.session)]
    assert "s3cret" not in "".join(shown) + caplog.text

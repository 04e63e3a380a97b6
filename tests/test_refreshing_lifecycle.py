"""How a source lives and ends: what it tells, how it is closed, collected and left, and what nobody ever sees."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from pathlib import Path

import pytest
from conftest import eventually
from scripted import (
    PATIENCE,
    SECRET,
    World,
    a_session,
    in_background,
    settled,
    value,
)

from interceptors import (
    AuthError,
    LoginRequired,
    MemoryStore,
    RefreshError,
    RefreshingTokenSource,
    SourceStats,
    StoreError,
    Token,
)
from interceptors.call import no_token

# on_refresh


def test_on_refresh_is_told_each_refreshed_session_on_the_sources_thread_after_it_was_saved():
    told = []
    with World() as world:
        source = world.warm_source(
            on_refresh=lambda s: told.append((s, world.store.session, world.store.locked, threading.current_thread()))
        )
        assert told == []
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)
        source.reject(source.token())
        source.token(timeout=PATIENCE)
        assert [session for session, *_ in told] == world.issuer.issued
        assert all(saved is session and not locked for session, saved, locked, _ in told)
        assert {thread for *_, thread in told} == {source._thread}


def test_on_refresh_is_not_told_of_what_another_process_has_refreshed():
    told = []
    with World() as world:
        source = world.warm_source(on_refresh=told.append)
        world.clock.advance(7200)
        world.store.session = a_session(world.clock, 50)
        source.token(timeout=PATIENCE)
        assert told == []


@pytest.mark.parametrize("error", [ValueError(SECRET), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_what_on_refresh_raises_harms_nobody_and_is_logged_without_its_text(error, caplog):
    def on_refresh(_):
        raise error

    with World() as world:
        source = world.warm_source(on_refresh=on_refresh)
        for number in range(1, 4):
            world.clock.advance(7200)
            assert source.token(timeout=PATIENCE).value == value(number)
        assert caplog.text.count("on_refresh failed with") == 3
        assert "in on_refresh" in caplog.text  # where it failed
        assert SECRET not in caplog.text


def test_on_refresh_may_use_the_new_token():
    got = []
    with World() as world:
        source = world.warm_source(on_refresh=lambda _: got.append(source.token(timeout=PATIENCE)))
        world.clock.advance(7200)
        assert source.token(timeout=PATIENCE) is got[0]


def test_waiting_for_a_token_inside_refresh_or_on_refresh_is_an_error_and_no_deadlock():
    errors = []

    def on_refresh(_):
        source.reject(source.peek())
        try:
            source.token()
        except RefreshError as error:
            errors.append(error)

    with World() as world:
        source = world.warm_source(on_refresh=on_refresh)
        world.clock.advance(7200)
        assert source.token(timeout=PATIENCE).value == value(1)
        assert "must not use it" in str(errors[0])
        world.issuer.script.append(lambda _: source.token())
        world.clock.advance(7200)
        with pytest.raises(RefreshError, match="must not use it"):
            source.token(timeout=PATIENCE)


def test_so_it_is_on_an_event_loop_inside_refresh():
    with World() as world:
        source = world.warm_source()
        world.issuer.script.append(lambda _: asyncio.run(source.token_async()))
        world.clock.advance(7200)
        with pytest.raises(RefreshError, match="must not use it"):
            source.token(timeout=PATIENCE)


# stats


def test_stats_tell_why_it_refreshed():
    with World() as world:
        source = world.warm_source()
        assert source.stats == SourceStats()
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)  # 1: mandatory
        world.clock.advance(2800)
        source.token(timeout=PATIENCE)  # 2: proactive
        eventually(lambda: source.peek().value == value(2))
        settled(source)
        source.reject(source.token())
        source.token(timeout=PATIENCE)  # 3: reactive
        world.clock.advance(7200)
        world.store.session = a_session(world.clock, 50)
        source.token(timeout=PATIENCE)  # adopted
        world.clock.advance(7200)
        world.issuer.script.append(RefreshError("down"))
        with pytest.raises(RefreshError):
            source.token(timeout=PATIENCE)
        assert source.stats == SourceStats(proactive=1, mandatory=1, reactive=1, failures=1, adoptions=1, rejected=1)
        assert source.stats.refreshes == 3


def test_the_session_in_use_can_be_seen():
    with World() as world:
        source = world.source()
        assert source.session is None
        source.token(timeout=PATIENCE)
        assert source.session is world.store.session


# close


def threads_of_sources():
    return [thread for thread in threading.enumerate() if thread.name == "interceptors-token-source"]


def test_a_closed_source_has_no_thread_and_closing_twice_is_harmless():
    with World() as world:
        source = world.warm_source()
        thread = source._thread
        source.close()
        assert not thread.is_alive()
        source.close()


def test_a_source_that_was_never_used_has_no_thread():
    with World() as world:
        source = world.source()
        assert source._thread is None
        source.close()


def test_a_context_manager_closes_it():
    with World() as world:
        with RefreshingTokenSource(world.store, world.issuer, clock=world.clock) as source:
            source.token(timeout=PATIENCE)
            thread = source._thread
        assert not thread.is_alive()


def test_close_waits_for_the_refresh_under_way_and_who_waits_for_it_gets_its_token():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        with world.issuer.closed_gate():
            waiting = in_background(lambda: source.token(timeout=PATIENCE))
            world.issuer.wait_for_request()
            closing = in_background(source.close)
            eventually(lambda: source._closed)
        closing()
        assert waiting().value == value(1)
        assert world.store.saved == world.issuer.issued


def test_close_from_on_refresh_does_not_wait_for_itself():
    with World() as world:
        source = world.warm_source(on_refresh=lambda _: source.close())
        thread = source._thread
        world.clock.advance(7200)
        assert source.token(timeout=PATIENCE).value == value(1)
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_closed_source_hands_out_its_token_while_it_works_and_then_says_that_it_is_closed():
    with World() as world:
        source = world.warm_source()
        source.close()
        world.clock.advance(2800)
        for _ in range(3):
            assert source.peek().value == source.token(timeout=PATIENCE).value == value(0)
        world.clock.advance(7200)
        with pytest.raises(RefreshError, match=r"closed.*keep it open"):
            source.token()
        assert source.peek() is None
        assert world.issuer.asked == []


def test_a_source_that_was_closed_before_its_first_token_says_so():
    with World() as world:
        source = world.source()
        source.close()
        with pytest.raises(RefreshError, match="closed"):
            source.token()


# Threads


def test_a_source_that_is_left_behind_is_collected_and_its_thread_ends():
    with World() as world:
        source = RefreshingTokenSource(world.store, world.issuer, clock=world.clock)
        source.token(timeout=PATIENCE)
        thread, gone = source._thread, weakref.ref(source)
        settled(source)
        del source
        gc.collect()
        eventually(lambda: gone() is None)
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_so_it_is_after_a_failure():
    with World() as world:
        world.clock.advance(7200)
        world.issuer.script.append(RefreshError("down"))
        source = RefreshingTokenSource(world.store, world.issuer, clock=world.clock)
        with pytest.raises(RefreshError):
            source.token(timeout=PATIENCE)
        thread = source._thread
        del source

        def ended():
            gc.collect()
            return not thread.is_alive()

        eventually(ended)


def test_a_source_that_is_left_behind_unsaved_lives_until_its_session_is_saved():
    with World() as world:
        source = RefreshingTokenSource(world.store, world.issuer, clock=world.clock)
        source.token(timeout=PATIENCE)
        world.store.failing["save"] = StoreError("gone")
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)
        thread = source._thread
        del source
        gc.collect()
        world.store.failing.clear()
        eventually(lambda: world.store.session == world.issuer.issued[-1])

        def ended():
            gc.collect()
            return not thread.is_alive()

        eventually(ended)


def test_a_thread_that_cannot_be_started_is_an_error_for_who_asked_and_the_next_call_tries_again(monkeypatch):
    with World() as world:
        source = world.source()

        def no_threads(_):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_threads)
            with pytest.raises(RuntimeError, match="can't start"):
                source.token(timeout=1)
        assert source.token(timeout=PATIENCE).value == value(0)


def test_a_thread_that_cannot_be_started_is_no_error_while_there_is_a_token(monkeypatch):
    with World() as world:
        world.clock.advance(2800)  # inside the window
        source = world.source()
        source._hold(world.store.session)
        source._seen = world.store.session

        def no_threads(_):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_threads)
            assert source.token(timeout=1).value == value(0)
        assert source.token(timeout=PATIENCE).value == value(0)
        eventually(lambda: source.peek().value == value(1))


# The end of the program


def run_program(text):
    program = textwrap.dedent(text)
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parent,
    )


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "source = None", "source.close()"])
def test_a_refresh_under_way_at_the_end_of_the_program_is_finished_and_saved(ending, tmp_path):
    finished = run_program(f"""
        import threading, time
        from interceptors import FileStore, RefreshingTokenSource, Session

        path = {str(tmp_path / "session")!r}
        store = FileStore(path)
        store.save(Session(access_token="old", issued_at=0.0, expires_at=1.0, refresh_token="first"))
        begun = threading.Event()

        def refresh(session):
            begun.set()
            time.sleep(0.5)  # the issuer has rotated the refresh token, its answer is on the way
            now = time.time()
            return Session(access_token="new", issued_at=now, expires_at=now + 3600, refresh_token="second")

        source = RefreshingTokenSource(store, refresh)
        threading.Thread(target=lambda: source and source.token(), daemon=True).start()
        begun.wait(10)
        {ending}
    """)
    assert finished.returncode == 0, finished.stderr
    assert '"second"' in (tmp_path / "session").read_text()
    assert finished.stderr == ""


def test_closing_that_ctrl_c_interrupts_does_not_lose_the_refresh_under_way(tmp_path):
    finished = run_program(f"""
        import os, signal, threading, time
        from interceptors import FileStore, RefreshingTokenSource, Session

        store = FileStore({str(tmp_path / "session")!r})
        now = time.time()
        # Still good, in its last quarter: a refresh runs in the background, and nobody waits for it but close().
        store.save(Session(access_token="old", issued_at=now - 3300, expires_at=now + 300, refresh_token="first"))
        begun, interrupted = threading.Event(), threading.Event()

        def refresh(session):
            begun.set()
            interrupted.wait(10)
            time.sleep(0.5)  # the issuer has rotated the refresh token, its answer is on the way
            now = time.time()
            return Session(access_token="new", issued_at=now, expires_at=now + 3600, refresh_token="second")

        def interrupt():
            while not source._closed:
                time.sleep(0.01)
            time.sleep(0.2)  # what follows it is the wait
            os.kill(os.getpid(), signal.SIGINT)

        source = RefreshingTokenSource(store, refresh)
        source.token()
        source.token()
        begun.wait(10)
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            source.close()
        except KeyboardInterrupt:
            interrupted.set()
    """)
    assert finished.returncode == 0, finished.stderr
    assert '"second"' in (tmp_path / "session").read_text()


def test_the_program_ends_at_once_when_nothing_is_under_way():
    finished = run_program("""
        import time
        from interceptors import MemoryStore, RefreshingTokenSource, Session
        now = time.time()
        store = MemoryStore(Session(access_token="a", issued_at=now, expires_at=now + 3600))
        sources = [RefreshingTokenSource(store, print) for _ in range(20)]
        for source in sources:
            source.token()
    """)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_the_end_of_the_program_waits_for_many_refreshes_that_hang_no_longer_than_for_one():
    begin = time.monotonic()
    finished = run_program("""
        import threading
        from interceptors import MemoryStore, RefreshingTokenSource, refreshing
        refreshing._CLOSE_SECONDS = 1.0
        hanging = [threading.Event() for _ in range(20)]

        def refresh_of(event):
            def refresh(_):
                event.set()
                threading.Event().wait()
            return refresh

        sources = [RefreshingTokenSource(MemoryStore(), refresh_of(event)) for event in hanging]
        for source in sources:
            threading.Thread(target=source.token, daemon=True).start()
        for event in hanging:
            assert event.wait(20)
    """)
    assert finished.returncode == 0, finished.stderr
    assert time.monotonic() - begin < 10


# What nobody ever sees


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_no_repr_and_no_str_shows_a_token():
    with World() as world:
        source = world.warm_source()
        held = [
            source,
            source.session,
            source.token(),
            source.stats,
            MemoryStore(source.session),
            no_token(AuthError()),
        ]
        for thing in held:
            assert SECRET not in f"{thing!r} {thing!s}"


def failing_scenarios():
    def leaking(session):
        try:
            raise OSError(session.refresh_token)
        except OSError as error:
            raise ValueError("no answer for " + session.access_token) from error

    def rubbish(session):
        return {"access_token": session.access_token, "refresh_token": session.refresh_token}

    def unusable(session):
        return Token(session.access_token + "\r\n")

    def mistaken(session):
        return session[session.refresh_token]

    def noted(session):
        error = ValueError("no answer")
        error.add_note(f"sent {session.refresh_token}")
        raise error

    def grouped(session):
        error = OSError("no answer")
        error.__cause__ = ValueError(session.refresh_token)
        raise ExceptionGroup("tries", [error])

    def caused(session):
        raise RefreshError("no answer") from KeyError(session.refresh_token)

    def told(session):
        raise RefreshError("no answer for " + session.refresh_token, retry_after=0.1)

    def odd(session):
        class OddError(Exception):
            def __str__(self):
                raise ValueError(session.refresh_token)

        raise OddError

    yield from (leaking, rubbish, unusable, mistaken, noted, grouped, caused, told, odd)


@pytest.mark.parametrize("scenario", list(failing_scenarios()), ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize(
    "failing", [{}, {"save": OSError(f"cannot write {SECRET}-refresh-1")}], ids=["saved", "unsaved"]
)
def test_no_error_and_no_log_shows_a_token(scenario, failing, caplog):
    caplog.set_level(logging.DEBUG)
    with World() as world:
        source = world.warm_source(on_refresh=lambda session: {}[session.access_token])
        world.store.failing.update(failing)
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)
        source.reject(source.token())
        world.issuer.script.extend([scenario] * 3)
        source.token(timeout=PATIENCE)
        world.clock.advance(7200)
        with pytest.raises(RefreshError) as caught:
            source.token(timeout=PATIENCE)
        for error in chain(caught.value):
            assert SECRET not in f"{error!s} {error!r} {getattr(error, '__notes__', '')}"
        lines = "".join(traceback.format_exception(caught.value))
        assert SECRET not in lines
        failure = no_token(caught.value)
        assert SECRET not in failure.details
    formatted = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    assert SECRET not in formatted


@pytest.mark.parametrize("shown", ["cause", "text"])
def test_a_login_that_is_required_is_said_without_the_token_that_its_error_shows(shown):
    def ended(session):
        if shown == "cause":
            raise LoginRequired("log in") from KeyError(session.refresh_token)
        raise LoginRequired("log in: " + session.refresh_token)

    with World() as world:
        world.clock.advance(7200)
        world.issuer.script.append(ended)
        for _ in range(2):
            with pytest.raises(LoginRequired, match="log") as caught:
                world.source().token(timeout=PATIENCE)
            assert SECRET not in "".join(traceback.format_exception(caught.value))
            world.issuer.script.append(ended)


def test_a_login_that_is_required_shows_no_token_either(caplog):
    caplog.set_level(logging.DEBUG)
    with World() as world:
        world.clock.advance(7200)
        world.issuer.script.append(LoginRequired("the session has ended"))
        with pytest.raises(LoginRequired) as caught:
            world.source().token(timeout=PATIENCE)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in caplog.text

"""Rules 1 to 4 and 8 for the source: fresh, stale, due, expired; who waits, who does not, and what it costs."""

from __future__ import annotations

import threading
import time
import tracemalloc
from datetime import timedelta

import pytest
from conftest import eventually
from scripted import PATIENCE, World, a_session, in_background, in_threads, settled, value, values

from interceptors import RefreshError, RefreshingTokenSource


class Forbidden:
    """Stands for something that must not be touched."""

    def __getattr__(self, name):
        raise AssertionError(name)

    def __enter__(self):
        raise AssertionError("locked")

    def __exit__(self, *_):
        raise AssertionError("unlocked")


# Rule 1: fresh


def test_a_fresh_token_is_handed_out_without_a_lock_and_without_io():
    with World() as world:
        source = world.warm_source()
        lock, jobs, store = source._lock, source._jobs, source._store
        source._lock = source._jobs = source._store = Forbidden()
        try:
            assert source.peek().value == value(0)
            assert source.token().value == value(0)
            assert source.token(timeout=0).value == value(0)
        finally:
            source._lock, source._jobs, source._store = lock, jobs, store
        assert world.issuer.asked == []


def test_a_fresh_token_is_handed_out_without_allocation():
    with World() as world:
        source = world.warm_source()
        now = world.clock()
        source._clock = lambda: now
        for _ in range(100):
            source.peek()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            for _ in range(1000):
                source.peek()
                source.token()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak - before < 1000  # whatever the tracing itself needs; not a byte a call


def test_peek_before_the_first_token_says_that_somebody_has_to_wait_and_touches_nothing():
    with World() as world:
        source = world.source()
        assert source.peek() is None
        assert world.store.done == []


def test_the_first_token_comes_from_the_store_without_asking_the_issuer():
    with World() as world:
        assert world.source().token(timeout=PATIENCE).value == value(0)
        assert world.issuer.asked == []
        assert world.store.done == ["load"]


def test_a_token_of_unknown_expiry_stays_fresh_until_it_is_refused():
    with World(lifetime=None) as world:
        source = world.warm_source()
        world.clock.advance(10 * 365 * 86400)
        assert source.peek().value == value(0)
        source.reject(source.peek())
        assert source.token(timeout=PATIENCE).value == value(1)


# Rule 2: stale


@pytest.mark.parametrize(
    ("window", "lifetime", "fresh_for"),
    [
        (timedelta(minutes=15), 7200.0, 6300.0),
        (timedelta(minutes=15), 3600.0, 2700.0),
        (timedelta(minutes=15), 8.0, 6.0),
        (timedelta(minutes=5), 3600.0, 3300.0),
        (timedelta(0), 3600.0, 3570.0),
    ],
)
def test_a_token_is_fresh_until_the_window_or_the_last_quarter_of_its_life(window, lifetime, fresh_for):
    with World(lifetime=lifetime) as world:
        source = world.warm_source(window=window)
        world.clock.advance(fresh_for - 0.001)
        source.token()
        settled(source)
        assert world.issuer.asked == []
        world.clock.advance(0.002)
        source.token(timeout=PATIENCE)
        eventually(lambda: len(world.issuer.issued) == 1)


def test_jitter_draws_up_to_a_tenth_of_the_window_for_each_token():
    drawn = iter([1.0, 0.0])
    with World() as world:
        source = world.warm_source(jitter=lambda: next(drawn))
        assert source._held.fresh_until == pytest.approx(world.clock() + 3600 - 900 * 0.9)
        world.clock.advance(3600)
        source.token(timeout=PATIENCE)
        assert source._held.fresh_until == pytest.approx(world.clock() + 3600 - 900)


def test_in_the_window_nobody_waits_while_one_refresh_runs_for_seconds():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(3000)
        with world.issuer.closed_gate():
            assert source.token(timeout=0).value == value(0)
            world.issuer.wait_for_request()
            for _ in range(1000):
                assert source.peek().value == value(0)
                assert source.token(timeout=0).value == value(0)
            assert values(in_threads(50, lambda _: source.token(timeout=0))) == {value(0)}
        eventually(lambda: source.peek().value == value(1))
        settled(source)
        assert len(world.issuer.asked) == 1
        assert source.stats.proactive == source.stats.refreshes == 1


def test_peek_alone_keeps_a_session_fresh():
    with World() as world:
        source = world.warm_source()
        for generation in range(1, 6):
            world.clock.advance(2800)
            assert source.peek() is not None
            eventually(lambda g=generation: source.peek() is not None and source.peek().value == value(g))
        settled(source)
        assert len(world.issuer.asked) == 5


def test_nudges_do_not_pile_up_behind_a_slow_refresh():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(3000)
        with world.issuer.closed_gate():
            source.peek()
            world.issuer.wait_for_request()
            for _ in range(1000):
                source.peek()
            assert source._jobs.qsize() == 0
        settled(source)
        assert len(world.issuer.asked) == 1


def test_a_failing_background_refresh_is_tried_again_no_more_often_than_its_back_off_allows():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(2800)
        world.issuer.script.extend(ConnectionError("down") for _ in range(100))
        for _ in range(600):
            assert source.peek().value == value(0)
            settled(source)
            world.clock.advance(1)
        assert 20 <= len(world.issuer.asked) <= 40  # 600 s at a cap of 30 s, less up to a quarter


def test_a_token_that_lives_eight_seconds_is_not_refreshed_on_every_call():
    with World(lifetime=8.0) as world:
        source = world.warm_source()
        for _ in range(800):
            source.token(timeout=PATIENCE)
            world.clock.advance(0.1)
            settled(source)
        assert 10 <= len(world.issuer.asked) <= 14


def test_an_idle_source_makes_no_requests():
    with World() as world:
        source = world.warm_source()
        done = len(world.store.done)
        world.clock.advance(86400)
        assert not world.issuer.arrived.acquire(timeout=0.2)
        assert len(world.store.done) == done
        assert source.stats.refreshes == 0


# Rule 3: due and expired


@pytest.mark.parametrize(
    ("lifetime", "left"), [(3600.0, 29.9), (3600.0, 0.1), (100.0, 9.9), (8.0, 0.7), (3600.0, -1.0)]
)
def test_when_little_is_left_callers_wait_for_the_next_token(lifetime, left):
    with World(lifetime=lifetime) as world:
        source = world.warm_source()
        world.clock.advance(lifetime - left)
        assert source.peek() is None
        assert source.token(timeout=PATIENCE).value == value(1)
        assert source.stats.mandatory == 1


@pytest.mark.parametrize(("lifetime", "left"), [(3600.0, 30.1), (100.0, 10.1), (8.0, 0.9)])
def test_before_that_they_do_not(lifetime, left):
    with World(lifetime=lifetime) as world:
        source = world.warm_source()
        world.clock.advance(lifetime - left)
        with world.issuer.closed_gate():
            assert source.token(timeout=0).value == value(0)


def test_two_hundred_threads_that_meet_an_expired_token_cost_one_refresh():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        assert values(in_threads(200, lambda _: source.token(timeout=PATIENCE))) == {value(1)}
        assert len(world.issuer.asked) == 1
        assert len(world.store.saved) == 1


def test_two_hundred_threads_that_come_first_cost_one_look_at_the_store():
    with World() as world:
        source = world.source()
        assert values(in_threads(200, lambda _: source.token(timeout=PATIENCE))) == {value(0)}
        assert world.store.done.count("load") <= 3  # a late thread may begin another round


def test_an_issuer_that_issues_expired_tokens_is_asked_once_an_attempt_while_time_goes_on():
    def issued_expired(_):
        world.clock.advance(0.01)  # on the way to the request
        return a_session(world.clock, 1, lifetime=0.0)

    with World() as world:
        world.clock.advance(7200)
        source = world.source()
        world.issuer.script += [issued_expired] * 3
        with pytest.raises(RefreshError, match="about to expire"):
            source.token(timeout=PATIENCE)
        assert len(world.issuer.asked) == 1


def test_each_waits_no_longer_than_its_own_time_and_the_refresh_serves_later_callers():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        with world.issuer.closed_gate():
            patient = in_background(lambda: source.token(timeout=PATIENCE))
            world.issuer.wait_for_request()
            begin = time.monotonic()
            for timeout in (0.0, 0.05, -1.0):
                with pytest.raises(TimeoutError):
                    source.token(timeout=timeout)
            assert time.monotonic() - begin < PATIENCE / 2
        assert patient().value == value(1)
        assert source.peek().value == value(1)
        assert len(world.issuer.asked) == 1


@pytest.mark.parametrize("timeout", [1e300, float("inf"), threading.TIMEOUT_MAX * 2])
def test_a_timeout_longer_than_the_machine_can_count_is_as_good_as_none(timeout):
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        assert source.token(timeout=timeout).value == value(1)


def test_a_token_that_is_issued_expired_is_no_token_and_does_not_make_every_call_refresh():
    with World(lifetime=0.0) as world:
        source = world.source()
        for _ in range(50):
            with pytest.raises(Exception, match="about to expire"):
                source.token(timeout=PATIENCE)
        assert len(world.issuer.asked) == 1
        world.issuer.lifetime = 3600.0
        world.clock.advance(60)
        assert source.token(timeout=PATIENCE).value == value(2)


def test_an_issuer_that_hands_out_its_cached_token_until_it_expires_is_not_asked_by_every_call():
    with World() as world:
        source = world.warm_source()
        cached = world.store.session
        world.issuer.script.extend(cached for _ in range(10_000))
        world.clock.advance(2701)
        calls = 0
        while world.clock() < cached.expires_at:
            assert source.token(timeout=PATIENCE).value == value(0)
            settled(source)
            world.clock.advance(0.5)
            calls += 1
        assert calls > 1000
        assert len(world.issuer.asked) < 60
        world.issuer.script.clear()
        world.clock.advance(60)
        assert source.token(timeout=PATIENCE).value == value(1)


# Rule 8: the wall clock


def test_a_laptop_that_slept_over_the_expiry_notices_on_its_first_call():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(12 * 3600)
        assert source.peek() is None
        assert source.token(timeout=PATIENCE).value == value(1)


def test_a_clock_that_is_set_back_ends_neither_the_token_nor_prolongs_a_back_off():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        world.issuer.script.append(ConnectionError("down"))
        with pytest.raises(Exception, match="ConnectionError"):
            source.token(timeout=PATIENCE)
        # 90 minutes back: the token has not expired (by this clock), the back-off is not to last 90 minutes.
        world.clock.advance(-5400)
        assert source.token(timeout=PATIENCE).value == value(0)
        world.clock.advance(1790)
        assert source.token(timeout=PATIENCE) is not None
        eventually(lambda: source.token(timeout=PATIENCE).value == value(1))


def test_a_clock_that_is_set_back_during_a_cool_down_ends_it():
    with World() as world:
        source = world.warm_source()
        for _ in range(2):
            source.reject(source.token(timeout=PATIENCE))
        assert source.peek() is not None  # in cool-down
        world.clock.advance(-3600)
        source.reject(source.peek())
        assert source.token(timeout=PATIENCE).value == value(2)


# Arguments


def good():
    world = World()
    return {"store": world.store, "refresh": world.issuer}


@pytest.mark.parametrize(
    ("argument", "given", "error", "message"),
    [
        ("store", None, TypeError, "store must be a SessionStore.*NoneType"),
        ("store", "~/.session", TypeError, "store must be a SessionStore.*str"),
        ("refresh", None, TypeError, r"refresh must be a callable.*OidcClient\(...\)\.refresh"),
        ("window", 900, TypeError, "window must be a datetime.timedelta.*not int"),
        ("window", None, TypeError, "window must be a datetime.timedelta"),
        ("window", timedelta(seconds=-1), ValueError, "must not be negative"),
        ("clock", 0.0, TypeError, "clock must be a callable.*float"),
        ("on_refresh", "print", TypeError, "on_refresh must be a callable.*str"),
    ],
)
def test_a_wrong_argument_is_refused_at_once_with_what_was_expected(argument, given, error, message):
    arguments = {**good(), argument: given}
    with pytest.raises(error, match=message):
        RefreshingTokenSource(arguments.pop("store"), arguments.pop("refresh"), **arguments)


# Tokens that live hardly longer than it takes to get them


def slow_answer(world, number, seconds):
    """An entry of an issuer's script: a session whose token is that old when it comes."""

    def answer(_):
        session = a_session(world.clock, number, lifetime=100.0)
        world.clock.advance(seconds)
        return session

    return answer


def test_a_token_that_comes_late_is_used_for_what_is_left_of_it():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        world.issuer.script.append(slow_answer(world, 1, 80.0))
        assert source.token(timeout=PATIENCE).value == value(1)
        assert len(world.issuer.asked) == 1


def test_a_token_that_comes_too_late_is_refreshed_once_more_before_anybody_fails():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        world.issuer.script += [slow_answer(world, 1, 200.0), slow_answer(world, 2, 200.0)]
        assert source.token(timeout=PATIENCE).value == value(1)  # the first one without a script
        assert [session.access_token for session in world.store.saved][:2] == [value(1), value(2)]
        assert len(world.issuer.asked) == 3


def test_an_issuer_whose_tokens_always_come_too_late_is_not_asked_for_ever():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        world.issuer.script += [slow_answer(world, number, 200.0) for number in range(1, 10)]
        with pytest.raises(RefreshError, match="about to expire"):
            source.token(timeout=PATIENCE)
        assert len(world.issuer.asked) == 3

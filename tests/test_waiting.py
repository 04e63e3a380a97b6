"""One thread waits for everybody: who is served by what, time limits, and what happens when things go wrong."""

from __future__ import annotations

import gc
import threading
import time

import pytest
from conftest import eventually
from scripted import PATIENCE, in_threads

from interceptors import StaticTokenSource, Token, TokenSource
from interceptors.waiting import Alarms, TokenWaiter, settle, waiter_of


class Gated(TokenSource):
    """Answers t1, t2, ... one a turn of the gate."""

    def __init__(self):
        self.turns = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.calls = 0

    def token(self, *, timeout=None):
        self.calls += 1
        number = self.calls
        self.entered.release()
        assert self.turns.acquire(timeout=PATIENCE)
        return Token(f"t{number}")


def test_there_is_one_waiter_for_a_source():
    source = Gated()
    waiters = in_threads(50, lambda _: waiter_of(source))
    assert len(set(map(id, waiters))) == 1


def test_whoever_asks_while_a_question_is_under_way_is_served_by_the_next():
    source = Gated()
    waiter = waiter_of(source)
    first = waiter.request()
    assert source.entered.acquire(timeout=PATIENCE)
    later = [waiter.request() for _ in range(100)]
    source.turns.release()
    assert first.result(PATIENCE).value == "t1"
    source.turns.release()
    assert {future.result(PATIENCE).value for future in later} == {"t2"}
    assert source.calls == 2


def test_a_request_ends_in_time_and_the_others_go_on_waiting():
    source = Gated()
    waiter = waiter_of(source)
    patient = waiter.request()
    hasty = waiter.request(timeout=0.01)
    with pytest.raises(TimeoutError):
        hasty.result(PATIENCE)
    assert not patient.done()
    source.turns.release(2)
    assert patient.result(PATIENCE).value in {"t1", "t2"}


def test_a_request_never_blocks():
    source = Gated()
    begin = time.monotonic()
    futures = [waiter_of(source).request(timeout=PATIENCE) for _ in range(1000)]
    assert time.monotonic() - begin < PATIENCE / 2
    source.turns.release(10)
    for future in futures:
        future.result(PATIENCE)


def test_the_thread_ends_when_nobody_asks_for_a_while(monkeypatch):
    monkeypatch.setattr("interceptors.waiting._LINGER_SECONDS", 0.01)
    waiter = TokenWaiter(source := StaticTokenSource("abc"))
    for _ in range(3):
        assert waiter.request().result(PATIENCE).value == "abc"
        eventually(lambda: not waiter._running)
    assert source is not None


def test_a_waiter_whose_source_is_gone_says_so():
    waiter = TokenWaiter(StaticTokenSource("abc"))
    gc.collect()
    with pytest.raises(ReferenceError, match="gone"):
        waiter.request()


def test_a_thread_that_cannot_be_started_is_an_error_for_who_asked_and_the_next_one_is_served(monkeypatch):
    source = StaticTokenSource("abc")

    def no_threads(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_threads)
        with pytest.raises(RuntimeError, match="can't start"):
            waiter_of(source).request()
        alarms = Alarms()
        with pytest.raises(RuntimeError, match="can't start"):
            alarms.at(0.0, lambda: None)
    assert waiter_of(source).request(timeout=PATIENCE).result(PATIENCE).value == "abc"
    rung = threading.Event()
    alarms.at(0.0, rung.set)
    assert rung.wait(PATIENCE)


def test_settling_twice_keeps_the_first_answer():
    source = Gated()
    future = waiter_of(source).request()
    settle(future, Token("mine"))
    settle(future, ValueError("late"))
    source.turns.release()
    assert future.result(PATIENCE).value == "mine"
    cancelled = waiter_of(source).request()
    cancelled.cancel()
    settle(cancelled, Token("late"))
    assert cancelled.cancelled()
    source.turns.release(3)


# Alarms


def test_alarms_ring_in_the_order_of_their_times_however_they_were_set():
    alarms, rung = Alarms(), []
    now = time.monotonic()
    done = threading.Event()
    for delay in (0.06, 0.02, 0.04, 0.0):
        alarms.at(now + delay, lambda delay=delay: rung.append((delay, time.monotonic() - now)))
    alarms.at(now + 0.08, done.set)
    assert done.wait(PATIENCE)
    assert [delay for delay, _ in rung] == [0.0, 0.02, 0.04, 0.06]
    assert all(after >= delay for delay, after in rung)


def test_a_nearer_alarm_is_not_kept_waiting_by_a_far_one():
    alarms, rung = Alarms(), threading.Event()
    alarms.at(time.monotonic() + 3600, lambda: None)
    alarms.at(float("inf"), lambda: None)
    alarms.at(time.monotonic() + 0.01, rung.set)
    assert rung.wait(PATIENCE)


def test_alarms_far_beyond_what_the_machine_can_count_stop_no_others():
    alarms, rung = Alarms(), threading.Event()
    alarms.at(float("inf"), lambda: None)
    alarms.at(1e300, lambda: None)
    time.sleep(0.02)  # the thread has begun to wait for them
    alarms.at(time.monotonic(), rung.set)
    assert rung.wait(PATIENCE)


def test_the_alarm_thread_exists_only_while_any_is_due():
    alarms, rung = Alarms(), threading.Event()
    assert not alarms._running
    for _ in range(3):
        rung.clear()
        alarms.at(time.monotonic() + 0.001, rung.set)
        assert rung.wait(PATIENCE)
        eventually(lambda: not alarms._running)


def test_alarms_that_are_set_from_many_threads_all_ring():
    alarms, lock, rung = Alarms(), threading.Lock(), []

    def set_some(i):
        for step in range(20):
            alarms.at(time.monotonic() + 0.001 * ((i * step) % 7), lambda: rung.append(1))
        with lock:
            return "set"

    in_threads(16, set_some)
    eventually(lambda: len(rung) == 320)


def test_an_alarm_may_set_another():
    alarms, rung = Alarms(), threading.Event()
    alarms.at(time.monotonic(), lambda: alarms.at(time.monotonic(), rung.set))
    assert rung.wait(PATIENCE)

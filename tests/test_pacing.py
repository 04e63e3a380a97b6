"""How often the issuer is asked: back-off and cool-down, pure functions of the time that they are told."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptors.pacing import Backoff, CoolDown

moments = st.floats(0, 4e9)


def test_nothing_is_paced_at_first():
    assert not Backoff().active(0.0)
    assert not CoolDown().active(0.0)


def test_a_back_off_doubles_up_to_its_cap_and_begins_anew_after_a_success():
    backoff = Backoff(first=1.0, cap=10.0, jitter=lambda: 0.0)
    delays = []
    for _ in range(6):
        backoff.fail(100.0)
        delays.append(backoff.until - 100.0)
    assert delays == [1, 2, 4, 8, 10, 10]
    backoff.reset()
    assert not backoff.active(100.0)
    backoff.fail(100.0)
    assert backoff.until == 101.0


@given(jitter=st.floats(0, 1, exclude_max=True), failures=st.integers(1, 2000), now=moments)
def test_jitter_shortens_a_back_off_by_a_quarter_at_most_however_often_it_failed(jitter, failures, now):
    exact, jittered = Backoff(jitter=lambda: 0.0), Backoff(jitter=lambda: jitter)
    for _ in range(failures):
        exact.fail(now)
        jittered.fail(now)
    longest = exact.until - now
    assert 0 < longest <= 30.0 + 1e-6
    assert longest * 0.75 - 1e-6 <= jittered.until - now <= longest + 1e-6


@given(retry_after=st.one_of(st.none(), st.floats()), now=moments)
def test_whatever_the_issuer_asks_for_a_back_off_ends_within_an_hour(retry_after, now):
    backoff = Backoff()
    backoff.fail(now, retry_after)
    assert backoff.active(now)
    assert not backoff.active(now + 3601.0)
    if retry_after is not None and 1 <= retry_after <= 3600:
        assert backoff.until == pytest.approx(now + retry_after)


@given(now=moments, back=st.floats(1e-3, 1e9))
def test_a_clock_that_is_set_back_prolongs_nothing(now, back):
    backoff, cool_down = Backoff(), CoolDown()
    backoff.fail(now)
    cool_down.start(now)
    earlier = now - back
    if earlier < now:  # floats
        assert not backoff.active(earlier)
        assert not cool_down.active(earlier)


def test_a_cool_down_doubles_from_one_second_to_five_minutes():
    cool_down, now, seconds = CoolDown(), 1000.0, []
    for _ in range(12):
        cool_down.start(now)
        seconds.append(cool_down._until - now)
        now = cool_down._until
        assert not cool_down.active(now)
    assert seconds == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]


def test_a_refusal_during_a_cool_down_does_not_prolong_it():
    cool_down = CoolDown()
    cool_down.start(1000.0)
    cool_down.start(1000.9)
    assert cool_down.active(1000.99)
    assert not cool_down.active(1001.0)


def test_a_cool_down_begins_anew_when_a_server_has_accepted_a_token_or_after_quiet_minutes():
    cool_down = CoolDown()
    for now in (1000.0, 1002.0, 1005.0):
        cool_down.start(now)
    assert cool_down._seconds == 4
    cool_down.start(1310.0)
    assert cool_down._seconds == 1
    cool_down.start(1312.0)
    cool_down.reset()
    assert not cool_down.active(1312.5)
    cool_down.start(1312.5)
    assert cool_down._seconds == 1


@given(every=st.floats(0.01, 600.0))
def test_however_often_a_client_calls_a_server_that_refuses_everything_the_issuer_is_spared(every):
    cool_down, now, forced = CoolDown(), 1e9, 0
    end = now + 3600
    while now < end:
        if not cool_down.active(now):
            forced += 1
            cool_down.start(now)
        now += every if not cool_down.active(now) else max(every, math.ceil((cool_down._until - now) / every) * every)
    assert forced <= 9 + 3600 / 300 + 1

"""Rules 3, 4 and 8 without any flavour: what a call does with its token, its time and its source's errors."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import pytest
from conftest import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from interceptors import AuthError, LoginRequired, RefreshError, StoreError, Token, TokenSource
from interceptors.call import (
    Call,
    Failure,
    Send,
    Surface,
    carries_own_authorization,
    deadline_of,
    no_token,
)

OLD, NEW = Token("old"), Token("new")


class Told(TokenSource):
    """Answers what it is given, and remembers what it was told."""

    def __init__(self, answer=OLD):
        self.answer = answer
        self.heard = []

    def token(self, *, timeout=None):
        self.heard.append(("token", timeout))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def reject(self, token):
        self.heard.append(("reject", token.value))

    def accept(self, token):
        self.heard.append(("accept", token.value))


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock(5000.0)
    monkeypatch.setattr("interceptors.call.time", SimpleNamespace(monotonic=clock))
    return clock


def test_a_call_with_a_fresh_token_that_is_not_refused_tells_the_source_nothing(clock):
    source = Told()
    Call(source, None).passed()
    assert source.heard == []


def test_a_call_that_had_to_wait_for_its_token_tells_the_source_once_that_it_is_good(clock):
    source = Told()
    call = Call(source, None)
    assert call.begin(OLD) == Send(OLD, None)
    call.passed()
    call.passed()
    assert source.heard == [("accept", "old")]


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"])
def test_an_end_that_says_nothing_of_the_token_does_not_vouch_for_it(clock, code):
    source = Told()
    call = Call(source, None)
    call.begin(OLD)
    call.ended(code)
    assert source.heard == []
    call.ended("PERMISSION_DENIED")
    assert source.heard == [("accept", "old")]


def test_a_refused_call_is_sent_once_more_with_another_token_which_is_accepted_once(clock):
    source = Told()
    call = Call(source, None)
    call.begin(OLD)
    assert call.refused(OLD)
    assert call.again(NEW) == Send(NEW, None)
    call.passed()
    call.passed()
    assert source.heard == [("reject", "old"), ("accept", "new")]


def test_a_second_refusal_is_the_callers_and_the_source_is_told(clock):
    source = Told()
    call = Call(source, None)
    assert call.refused(OLD)
    call.again(NEW)
    assert not call.refused(NEW)
    call.passed()
    assert source.heard == [("reject", "old"), ("reject", "new")]


def test_a_call_that_cannot_be_replayed_is_not_sent_again_but_the_source_is_told(clock):
    source = Told()
    assert not Call(source, None).refused(OLD, replayable=False)
    assert source.heard == [("reject", "old")]


@pytest.mark.parametrize("again", [OLD, Token("old", 5.0)])
def test_the_same_token_is_not_sent_twice_in_one_call(clock, again):
    call = Call(Told(), None)
    call.refused(OLD)
    assert call.again(again) == Surface(None)


@pytest.mark.parametrize("error", [LoginRequired("log in"), RefreshError("down"), StoreError("locked"), OSError("odd")])
def test_when_no_other_token_can_be_had_the_caller_gets_the_servers_error_and_why(clock, error):
    call = Call(Told(), None)
    call.refused(OLD)
    assert call.again(error) == Surface(error)


# Time


def test_each_attempt_gets_what_is_left_of_the_callers_time(clock):
    call = Call(Told(), deadline_of(10.0))
    clock.advance(3)
    assert call.begin(OLD) == Send(OLD, 7.0)
    clock.advance(2)
    call.refused(OLD)
    clock.advance(4)
    assert call.again(NEW) == Send(NEW, 1.0)


@pytest.mark.parametrize("passed", [10.0, 11.0, 1e6])
@pytest.mark.parametrize("answer", [OLD, RefreshError("down"), LoginRequired("log in")], ids=repr)
def test_when_nothing_is_left_nothing_is_sent(clock, passed, answer):
    cause = answer if isinstance(answer, BaseException) else None
    for decide in ("begin", "again"):
        call = Call(Told(), deadline_of(10.0))
        if decide == "again":
            call.refused(Token("other"))
        clock.advance(passed)
        assert call.remaining() == 0.0
        decision = getattr(call, decide)(answer)
        assert (decision.code, decision.details, decision.cause) == ("DEADLINE_EXCEEDED", "Deadline Exceeded", cause)


def test_a_source_that_has_no_token_in_time_means_that_the_deadline_is_exceeded(clock):
    call = Call(Told(), deadline_of(10.0))
    assert call.begin(TimeoutError()).code == "DEADLINE_EXCEEDED"
    call.refused(OLD)
    assert call.again(TimeoutError()).code == "DEADLINE_EXCEEDED"


def test_without_a_deadline_a_timeout_is_an_error_of_the_source(clock):
    call = Call(Told(), None)
    assert call.begin(TimeoutError("slow")).code == "UNAVAILABLE"
    call.refused(OLD)
    error = TimeoutError("slow")
    assert call.again(error) == Surface(error)


def test_the_source_is_given_what_is_left_of_the_time(clock):
    source = Told()
    call = Call(source, deadline_of(10.0))
    clock.advance(4)
    assert call.ask() is OLD
    assert asyncio.run(call.ask_async()) is OLD
    clock.advance(40)
    call.ask()
    assert source.heard == [("token", 6.0), ("token", None), ("token", 0.0)]


# Errors


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (
            LoginRequired('no session: run "interceptors login"'),
            "UNAUTHENTICATED",
            'no session: run "interceptors login"',
        ),
        (LoginRequired("no session"), "UNAUTHENTICATED", 'no session: run "interceptors login"'),
        (RefreshError("the issuer is down"), "UNAVAILABLE", "no access token: the issuer is down; if this lasts"),
        (StoreError("the keyring is locked"), "UNAVAILABLE", "no access token: the keyring is locked"),
        (AuthError("odd"), "UNAVAILABLE", "no access token: odd"),
        (ValueError("s3cr3t"), "UNAVAILABLE", "no access token: the token source failed with ValueError"),
        (SystemExit("s3cr3t"), "UNAVAILABLE", "the token source failed with SystemExit"),
    ],
)
def test_no_token_for_the_first_attempt_is_an_error_that_says_what_to_do(clock, error, code, details):
    failure = no_token(error)
    assert failure.code == code
    assert details in failure.details
    assert failure.cause is error
    assert failure.details.count("interceptors login") == 1
    assert "s3cr3t" not in failure.details
    assert Call(Told(), None).begin(error) == failure


def test_whatever_the_source_raises_decides_how_the_call_ends():
    for error in (LoginRequired("x"), ValueError("x"), TimeoutError()):
        assert Call(Told(error), None).ask() is error
        assert str(asyncio.run(Call(Told(error), None).ask_async())) == str(error)


@pytest.mark.parametrize("answer", ["a-token", None, b"token", 5, {}], ids=repr)
def test_a_source_that_returns_something_else_is_named_as_the_culprit(clock, answer):
    begun = Call(Told(), None).begin(answer)
    assert isinstance(begun, Failure)
    assert begun.code == "UNAVAILABLE"
    assert isinstance(begun.cause, TypeError)
    assert f"must return a Token, not {type(answer).__name__}" in str(begun.cause)
    call = Call(Told(), None)
    call.refused(OLD)
    surfaced = call.again(answer)
    assert isinstance(surfaced, Surface)
    assert isinstance(surfaced.cause, TypeError)


def test_a_source_whose_reject_or_accept_fails_does_not_take_the_call_with_it(clock, caplog):
    class Broken(Told):
        def reject(self, token):
            raise ValueError(token.value)

        accept = reject

    call = Call(Broken(), None)
    with caplog.at_level(logging.DEBUG):
        assert call.refused(Token("s3cr3t"))
        call.again(NEW)
        call.passed()
        assert not call.refused(NEW)
    assert caplog.text.count("ValueError") == 3
    assert "s3cr3t" not in caplog.text


# The caller's own credentials


@pytest.mark.parametrize("key", ["authorization", "Authorization", "AUTHORIZATION", b"Authorization"])
def test_a_caller_that_brings_its_own_authorization_is_recognised_in_any_letter_case(key):
    assert carries_own_authorization([("a", "b"), (key, "Basic x")])
    assert carries_own_authorization(iter(((key, "x"),)))


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("x-authorization", "a")],
        [("authorization-x", "a")],
        [("a", "authorization")],
        ["authorization"],
        [()],
        [None],
        [(5, "a")],
        [("authorizatioŋ", "a")],
        [(b"\xff" * 13, "a")],
    ],
)
def test_everybody_else_is_not(metadata):
    assert not carries_own_authorization(metadata)


@given(st.lists(st.tuples(st.text(max_size=15), st.text(max_size=3))))
def test_own_authorization_is_whatever_equals_it_but_for_the_case(metadata):
    expected = any(key.lower() == "authorization" for key, _ in metadata)
    assert carries_own_authorization(metadata) == expected

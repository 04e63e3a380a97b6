from __future__ import annotations

import dataclasses
import datetime
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptors import Session, Token
from interceptors.freshness import freshness


@pytest.mark.parametrize("value", ["", "a b", "a\r\nx-evil: 1", "a\x00", "Bearer x", "é", "=", "a=b", "a\n"])
def test_a_token_that_could_inject_headers_is_refused_and_not_shown(value):
    with pytest.raises(ValueError, match="b64token") as caught:
        Token(value)
    assert value.strip() == "" or value not in str(caught.value) or len(value) < 3


@given(st.text(alphabet="abcXYZ019-._~+/", min_size=1), st.integers(0, 3))
def test_every_b64token_is_accepted(value, padding):
    assert Token(value + "=" * padding).header == f"Bearer {value}{'=' * padding}"


@pytest.mark.parametrize(
    "expires_at",
    [datetime.datetime(2030, 1, 1), datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC), "1", True],  # noqa: DTZ001
)
def test_an_expiry_that_is_no_number_says_what_was_expected(expires_at):
    with pytest.raises(TypeError, match="Unix seconds"):
        Token("t", expires_at)
    with pytest.raises(TypeError, match="Unix seconds"):
        Session(access_token="t", issued_at=0.0, expires_at=expires_at)


@pytest.mark.parametrize("expires_at", [float("nan"), float("inf"), 10**400], ids=["nan", "inf", "huge"])
def test_an_expiry_that_is_not_finite_is_refused(expires_at):
    with pytest.raises(ValueError, match="finite"):
        Token("t", expires_at)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Session) if "str | None" in field.type])
@pytest.mark.parametrize("wrong", [5, b"s3cret", ("s3cret", "b")], ids=repr)
def test_a_field_of_the_wrong_type_is_named_before_it_is_saved_and_cannot_be_read_back(field, wrong):
    with pytest.raises(TypeError, match=f"^{field} must be a str or None, not {type(wrong).__name__}$"):
        Session(access_token="t", issued_at=0.0, **{field: wrong})


def test_no_repr_shows_a_secret():
    session = Session(access_token="s3cret-a", refresh_token="s3cret-r", id_token="s3cret-i", issued_at=0.0)
    for thing in (session, session.token):
        assert "s3cret" not in repr(thing) + str(thing)


def test_tokens_and_sessions_are_values():
    session = Session(access_token="t", issued_at=1.0, expires_at=2.0, issuer="https://i", subject="s")
    assert session.token == Token("t", 2.0)
    assert session.identity == "https://i#s"
    assert pickle.loads(pickle.dumps(session)) == session
    with pytest.raises(AttributeError):
        session.token.value = "other"


@given(
    lifetime=st.floats(0, 1e6),
    window=st.floats(0, 1e5),
    jitter=st.floats(0, 1),
)
def test_the_windows_follow_the_rule_whatever_the_lifetime(lifetime, window, jitter):
    session = Session(access_token="t", issued_at=1000.0, expires_at=1000.0 + lifetime)
    stale_at, due_at, expires_at = freshness(session, window, jitter)
    assert 1000.0 <= stale_at <= due_at <= expires_at == session.expires_at
    proactive, mandatory = min(window, lifetime / 4), min(30.0, lifetime / 10)
    assert expires_at - due_at == pytest.approx(mandatory, abs=1e-6)
    assert expires_at - stale_at <= max(proactive, mandatory) + 1e-6
    assert expires_at - stale_at >= proactive * 0.9 - 1e-6


def test_a_token_of_unknown_expiry_stays_fresh():
    stale_at, due_at, expires_at = freshness(Session(access_token="t", issued_at=0.0), 900.0, 0.0)
    assert stale_at == due_at == expires_at == float("inf")

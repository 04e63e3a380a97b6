"""Rule 6 for the source: what passes, what only a login can mend, and how a session heals."""

from __future__ import annotations

import dataclasses
import time
from itertools import pairwise

import pytest
from conftest import eventually
from scripted import (
    PATIENCE,
    World,
    a_session,
    in_background,
    in_threads,
    settled,
    value,
    values,
)

from interceptors import AuthError, LoginRequired, RefreshError, StoreError, refreshing


class OddError(Exception):
    """Cannot be copied: its argument is by keyword only."""

    def __init__(self, *, why):
        super().__init__(why, "more")


class OtherArgumentsError(RefreshError):
    """Is made of something else than its message."""

    def __init__(self, status, *, where="the issuer"):
        super().__init__(f"{where} answered {status}")
        self.status = status


def expired_world(**options):
    world = World(**options)
    world.clock.advance(7200)
    return world


# Passing failures


@pytest.mark.parametrize(
    "failure",
    [
        RefreshError("the issuer is down"),
        ConnectionError("refused"),
        TimeoutError("too slow"),
        OddError(why="odd"),
        StopIteration("odd"),
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        None,
        "a-token",
        {"access_token": "a"},
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_whatever_refresh_does_callers_get_an_auth_error_and_the_next_attempt_may_succeed(failure):
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(failure)
        with pytest.raises(RefreshError):
            source.token(timeout=PATIENCE)
        world.clock.advance(1)
        assert source.token(timeout=PATIENCE).value == value(1)
        assert source.stats.failures == 1


def test_the_cause_of_a_failure_can_be_seen():
    with expired_world() as world:
        source = world.source()
        failure = ConnectionError("refused")
        world.issuer.script.append(failure)
        with pytest.raises(RefreshError, match="failed with ConnectionError") as caught:
            source.token(timeout=PATIENCE)
        assert caught.value.__cause__ is failure


def test_after_a_failure_callers_get_the_error_at_once_and_not_one_timeout_each():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(RefreshError("the issuer is down"))
        errors = in_threads(50, lambda _: source.token(timeout=PATIENCE))
        assert {(type(error), str(error)) for error in errors} == {(RefreshError, "the issuer is down")}
        assert len({id(error) for error in errors}) == 50  # each thread raises one of its own
        with world.issuer.closed_gate():
            begin = time.monotonic()
            for _ in range(100):
                with pytest.raises(RefreshError, match="down"):
                    source.token(timeout=PATIENCE)
            assert time.monotonic() - begin < PATIENCE / 2
        assert len(world.issuer.asked) == 1


def test_an_error_of_the_applications_own_kind_is_told_as_it_was_raised():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(OtherArgumentsError(503))
        for _ in range(3):
            with pytest.raises(OtherArgumentsError, match=r"^the issuer answered 503$") as caught:
                source.token(timeout=PATIENCE)
            assert caught.value.status == 503


def test_when_the_issuer_hangs_those_who_wait_share_one_timeout():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(RefreshError("the issuer hangs"))
        with world.issuer.closed_gate():
            waiting = [in_background(source.token) for _ in range(20)]
            world.issuer.wait_for_request()
        for wait in waiting:
            with pytest.raises(RefreshError, match="hangs"):
                wait()
        assert len(world.issuer.asked) == 1


def test_in_an_outage_nobody_waits_long_for_the_next_attempt_but_its_token_is_for_all(monkeypatch):
    monkeypatch.setattr(refreshing, "_BRIEFLY_SECONDS", 0.05)
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(RefreshError("down"))
        with pytest.raises(RefreshError, match="down"):
            source.token(timeout=PATIENCE)
        world.clock.advance(31)
        world.issuer.wait_for_request()
        with world.issuer.closed_gate():
            for timeout in (None, PATIENCE):
                with pytest.raises(RefreshError, match="down"):
                    in_background(lambda timeout=timeout: source.token(timeout=timeout))()
            with pytest.raises(TimeoutError):
                source.token(timeout=0.01)
            world.issuer.wait_for_request()
        settled(source)
        assert source.token(timeout=PATIENCE).value == value(1)
        assert len(world.issuer.asked) == 2


def test_long_after_a_failure_the_next_attempt_is_waited_for(monkeypatch):
    monkeypatch.setattr(refreshing, "_BRIEFLY_SECONDS", 0.0)
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(RefreshError("down"))
        with pytest.raises(RefreshError, match="down"):
            source.token(timeout=PATIENCE)
        world.issuer.wait_for_request()
        world.clock.advance(600)
        with world.issuer.closed_gate():
            waiting = in_background(lambda: source.token(timeout=PATIENCE))
            world.issuer.wait_for_request()
        assert waiting().value == value(1)


def test_attempts_are_spread_over_a_long_outage():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.extend(RefreshError("down") for _ in range(10_000))
        moments = []
        while len(moments) < 15:
            asked = len(world.issuer.asked)
            with pytest.raises(RefreshError):
                source.token(timeout=PATIENCE)
            if len(world.issuer.asked) > asked:
                moments.append(world.clock())
            world.clock.advance(0.125)
        gaps = [after - before for before, after in pairwise(moments)]
        assert gaps[0] <= 0.5
        assert all(later >= earlier for earlier, later in pairwise(gaps))
        assert 20 <= gaps[-1] <= 30.2


@pytest.mark.parametrize(("asked_to_wait", "waits"), [(120.0, 120.0), (0.0, 0.3), (-5.0, 0.3), (86400.0, 3600.0)])
def test_the_issuers_wish_to_wait_is_granted_within_reason(asked_to_wait, waits):
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(RefreshError("busy", retry_after=asked_to_wait))
        with pytest.raises(RefreshError):
            source.token(timeout=PATIENCE)
        world.clock.advance(waits - 0.1)
        with pytest.raises(RefreshError):
            source.token(timeout=PATIENCE)
        world.clock.advance(0.2)
        assert source.token(timeout=PATIENCE).value == value(1)


def test_a_retry_after_that_is_no_number_hangs_nobody():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(RefreshError("busy", retry_after="soon"))
        with pytest.raises(AuthError):
            source.token(timeout=PATIENCE)
        world.clock.advance(60)
        assert source.token(timeout=PATIENCE).value == value(1)


def test_nobody_notices_a_failure_while_the_token_works():
    with World() as world:
        source = world.warm_source()
        world.issuer.script.extend(RefreshError("down") for _ in range(1000))
        world.clock.advance(2701)
        while world.clock() < source.session.expires_at - 1:
            assert source.token(timeout=PATIENCE).value == value(0)
            settled(source)
            world.clock.advance(1)
        world.clock.advance(2)
        with pytest.raises(RefreshError, match="down"):
            source.token(timeout=PATIENCE)


def test_once_the_issuer_is_back_the_first_call_after_the_back_off_gets_a_token():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.extend(RefreshError("down") for _ in range(3))
        for _ in range(3):
            with pytest.raises(RefreshError):
                source.token(timeout=PATIENCE)
            world.clock.advance(30)
        assert source.token(timeout=PATIENCE).value == value(1)
        # and a later outage begins with a short back-off again
        world.clock.advance(7200)
        world.issuer.script.append(RefreshError("down"))
        with pytest.raises(RefreshError):
            source.token(timeout=PATIENCE)
        world.clock.advance(0.3)
        assert source.token(timeout=PATIENCE).value == value(2)


@pytest.mark.parametrize("expired", [False, True])
def test_another_processs_refresh_is_taken_over_during_a_back_off(expired):
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200 if expired else 3580)
        world.issuer.script.append(RefreshError("down", retry_after=3000.0))
        if expired:
            with pytest.raises(RefreshError):
                source.token(timeout=PATIENCE)
        else:
            source.token(timeout=PATIENCE)
        world.store.session = a_session(world.clock, 77)

        def healed():
            world.clock.advance(1.0)
            try:
                return source.token(timeout=PATIENCE).value == value(77)
            except RefreshError:
                return False

        eventually(healed)
        assert len(world.issuer.asked) == 1
        assert source.stats.adoptions == 1


def test_a_store_that_cannot_be_read_during_a_back_off_changes_nothing():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(RefreshError("down", retry_after=100.0))
        with pytest.raises(RefreshError):
            source.token(timeout=PATIENCE)
        world.store.failing["load"] = StoreError("unreadable")
        for _ in range(20):
            with pytest.raises(RefreshError, match="down"):
                source.token(timeout=PATIENCE)
            settled(source)
            world.clock.advance(2)
        assert source.stats.failures == 1
        del world.store.failing["load"]
        world.clock.advance(100)
        assert source.token(timeout=PATIENCE).value == value(1)


def test_during_an_outage_the_store_is_looked_at_once_a_second_at_most_and_only_for_calls():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(RefreshError("down", retry_after=3600.0))
        with pytest.raises(RefreshError):
            source.token(timeout=PATIENCE)
        loads = world.store.done.count("load")
        for _ in range(200):
            with pytest.raises(RefreshError):
                source.token(timeout=PATIENCE)
            settled(source)
            world.clock.advance(0.1)
        assert world.store.done.count("load") - loads <= 22


# What only a login can mend


def test_without_a_session_a_login_is_required_until_there_is_one():
    with World(session=None) as world:
        world.issuer.script.append(LoginRequired("log in"))
        source = world.source()
        for _ in range(5):
            with pytest.raises(LoginRequired, match="log in"):
                source.token(timeout=PATIENCE)
        assert world.issuer.asked == [None]
        world.store.session = a_session(world.clock, 5)
        assert source.token(timeout=PATIENCE).value == value(5)
        assert world.issuer.asked == [None]


def test_an_issuer_that_needs_no_session_is_asked_with_none():
    with World(session=None) as world:
        assert world.source().token(timeout=PATIENCE).value == value(1)
        assert world.issuer.asked == [None]


def test_a_session_that_has_ended_is_presented_once():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.extend(LoginRequired("ended") for _ in range(100))
        for _ in range(100):
            with pytest.raises(LoginRequired, match="ended"):
                source.token(timeout=PATIENCE)
            world.clock.advance(100)
        assert len(world.issuer.asked) == 1
        assert source.stats.failures == 1


def test_that_error_does_not_grow_with_every_call():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(LoginRequired("ended"))
        for _ in range(50):
            with pytest.raises(LoginRequired):
                source.token(timeout=PATIENCE)
        traceback, depth = source._dead.__traceback__, 0
        while traceback is not None:
            traceback, depth = traceback.tb_next, depth + 1
        assert depth < 10


def test_while_the_access_token_works_nobody_needs_to_know_that_the_session_has_ended():
    with World() as world:
        source = world.warm_source()
        world.issuer.script.append(LoginRequired("ended"))
        world.clock.advance(2701)
        while world.clock() < source.session.expires_at - 1:
            assert source.token(timeout=PATIENCE).value == value(0)
            settled(source)
            world.clock.advance(2)
        assert len(world.issuer.asked) == 1
        world.clock.advance(3)
        with pytest.raises(LoginRequired):
            source.token(timeout=PATIENCE)


def test_a_login_in_another_terminal_heals_the_next_call():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(LoginRequired("ended"))
        with pytest.raises(LoginRequired):
            source.token(timeout=PATIENCE)
        world.store.session = a_session(world.clock, 9)
        assert source.token(timeout=PATIENCE).value == value(9)
        assert len(world.issuer.asked) == 1


def test_a_login_heals_a_session_whose_access_token_still_works_within_a_second():
    with World() as world:
        source = world.warm_source()
        world.issuer.script.append(LoginRequired("ended"))
        world.clock.advance(2701)
        source.peek()
        settled(source)
        world.store.session = a_session(world.clock, 9)
        world.clock.advance(1.01)
        assert source.peek().value == value(0)
        eventually(lambda: source.peek().value == value(9))
        assert len(world.issuer.asked) == 1
        assert source.stats.adoptions == 1


def test_a_login_whose_token_has_nearly_expired_is_refreshed():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(LoginRequired("ended"))
        with pytest.raises(LoginRequired):
            source.token(timeout=PATIENCE)
        world.store.session = a_session(world.clock, 9)
        world.clock.advance(3599)
        assert source.token(timeout=PATIENCE).value == value(1)
        assert world.issuer.asked[-1].refresh_token.endswith("9")


def test_a_login_whose_token_has_nearly_expired_heals_although_the_first_refresh_of_it_fails():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(LoginRequired("ended"))
        with pytest.raises(LoginRequired):
            source.token(timeout=PATIENCE)
        world.store.session = login = a_session(world.clock, 9)
        world.clock.advance(7200)
        world.issuer.script.append(RefreshError("down"))
        with pytest.raises(RefreshError, match="down"):
            source.token(timeout=PATIENCE)
        world.clock.advance(1)
        assert source.token(timeout=PATIENCE).value == value(1)
        assert world.issuer.asked[1:] == [login, login]


def test_a_login_that_was_saved_while_the_old_session_was_found_to_have_ended_is_used_at_once():
    with expired_world() as world:
        source = world.source()

        def ended(_):
            world.store.session = a_session(world.clock, 9)
            raise LoginRequired("ended")

        world.issuer.script.append(ended)
        assert source.token(timeout=PATIENCE).value == value(9)
        assert source.stats.failures == 0


def test_a_session_that_has_ended_is_not_presented_again_because_the_store_cannot_be_read():
    with expired_world() as world:
        source = world.source()

        def ended(_):
            world.store.failing["load"] = StoreError("unreadable")
            raise LoginRequired("ended")

        world.issuer.script.append(ended)
        for _ in range(10):
            with pytest.raises(LoginRequired, match="ended"):
                source.token(timeout=PATIENCE)
            world.clock.advance(40)
        del world.store.failing["load"]
        with pytest.raises(LoginRequired, match="ended"):
            source.token(timeout=PATIENCE)
        assert len(world.issuer.asked) == 1
        world.clock.advance(40)
        world.store.session = a_session(world.clock, 9)
        assert source.token(timeout=PATIENCE).value == value(9)


@pytest.mark.parametrize("theirs", [{"issuer": "https://other.example"}, {"client_id": "other"}], ids=str)
@pytest.mark.parametrize("due", [False, True])
def test_a_session_of_another_issuer_or_client_is_not_taken_over_and_shown_to_nobody(theirs, due):
    with World() as world:
        source = world.warm_source()
        ours = a_session(world.clock, 9)
        world.store.session = dataclasses.replace(a_session(world.clock, 5), **theirs)
        if due:
            world.clock.advance(7200)
        else:
            source.reject(source.token())
        for _ in range(5):
            with pytest.raises(LoginRequired, match=r"belongs to client .* at https://.*interceptors login"):
                source.token(timeout=PATIENCE)
            world.clock.advance(40)
        assert world.issuer.asked == []
        assert source.stats.failures == 1
        world.store.session = dataclasses.replace(ours, expires_at=world.clock() + 3600)
        assert source.token(timeout=PATIENCE).value == value(9)
        assert world.issuer.asked == []


def test_while_its_own_token_works_nobody_notices_that_somebody_has_logged_in_elsewhere():
    with World() as world:
        source = world.warm_source()
        world.store.session = dataclasses.replace(a_session(world.clock, 5), issuer="https://other.example")
        world.clock.advance(2800)
        for _ in range(3):
            assert source.token(timeout=PATIENCE).value == value(0)
            settled(source)
            world.clock.advance(2)
        assert world.issuer.asked == []


def test_a_logout_elsewhere_ends_the_session_at_the_next_refresh():
    with World() as world:
        source = world.warm_source()
        world.store.session = None
        world.issuer.script.append(lambda session: (_ for _ in ()).throw(LoginRequired("log in")) if not session else 1)
        source.reject(source.token())  # a logout revokes the token
        for _ in range(10):
            with pytest.raises(LoginRequired, match="log in"):
                source.token(timeout=PATIENCE)
            world.clock.advance(60)
        assert world.issuer.asked == [None]
        assert world.store.saved == []


def test_many_threads_are_told_together_that_a_login_is_required():
    with expired_world() as world:
        source = world.source()
        world.issuer.script.append(LoginRequired("ended"))
        errors = in_threads(100, lambda _: source.token(timeout=PATIENCE))
        assert {type(error) for error in errors} == {LoginRequired}
        world.store.session = a_session(world.clock, 3)
        assert values(in_threads(100, lambda _: source.token(timeout=PATIENCE))) == {value(3)}
        assert len(world.issuer.asked) == 1

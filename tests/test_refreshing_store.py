"""Rules 4 and 5 for the source: one refresh over all who share a store, and nothing lost when the store fails."""

from __future__ import annotations

import dataclasses
import logging
import threading

import pytest
from conftest import FakeClock, eventually
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted import (
    PATIENCE,
    ScriptedIssuer,
    ScriptedStore,
    World,
    a_session,
    in_background,
    in_threads,
    settled,
    value,
    values,
)

from interceptors import (
    AuthError,
    LoginRequired,
    MemoryStore,
    RefreshError,
    RefreshingTokenSource,
    Session,
    StoreError,
    refreshing,
)

STORE_FAILURES = [
    StoreError("the keyring is locked"),
    OSError("no space"),
    ValueError("odd"),
    SystemExit(1),
    KeyboardInterrupt(),
]

# One refresh for all


def test_a_refresh_happens_under_the_lock_after_a_second_look_and_is_saved_before_it_is_given():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        world.store.done.clear()
        seen = []
        world.issuer.script.append(
            lambda _: seen.append((list(world.store.done), world.store.locked)) or a_session(world.clock, 1)
        )
        token = source.token(timeout=PATIENCE)
        assert seen == [(["lock", "load"], True)]
        assert world.store.done[:4] == ["lock", "load", "save", "unlock"]
        assert world.store.saved[0].access_token == token.value


def test_nobody_is_given_a_token_that_is_not_saved_yet():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        given = []
        save = world.store.save

        def look_and_save(session):
            given.append(source.peek())
            with pytest.raises(TimeoutError):
                in_background(lambda: source.token(timeout=0.01))()
            save(session)

        world.store.save = look_and_save
        assert source.token(timeout=PATIENCE).value == value(1)
        assert given == [None]


def test_a_session_that_another_process_has_refreshed_is_taken_over_without_asking_the_issuer():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        world.store.session = a_session(world.clock, 50)
        assert source.token(timeout=PATIENCE).value == value(50)
        assert world.issuer.asked == []
        assert world.store.saved == []
        assert source.stats.adoptions == 1
        assert source.stats.refreshes == 0


def test_so_it_is_after_a_rejection():
    with World() as world:
        source = world.warm_source()
        source.reject(source.token())
        world.store.session = a_session(world.clock, 50)
        assert source.token(timeout=PATIENCE).value == value(50)
        assert world.issuer.asked == []


def test_what_another_process_has_left_is_refreshed_if_it_is_the_refused_token_or_has_nearly_expired():
    with World() as world:
        source = world.warm_source()
        source.reject(source.token())
        rotated = dataclasses.replace(world.store.session, refresh_token="another-refresh-token")
        world.store.session = rotated
        assert source.token(timeout=PATIENCE).value == value(1)
        assert world.issuer.asked == [rotated]

        nearly_expired = a_session(world.clock, 60, lifetime=3600)
        world.store.session = nearly_expired
        world.clock.advance(3599)
        assert source.token(timeout=PATIENCE).value == value(2)
        assert world.issuer.asked[-1] == nearly_expired


def test_ahead_of_time_only_a_fresh_session_is_taken_over():
    with World() as world:
        source = world.warm_source()
        world.store.session = stale = a_session(world.clock, 60)
        world.clock.advance(2800)
        source.peek()
        eventually(lambda: source.peek() is not None and source.peek().value == value(1))
        assert world.issuer.asked == [stale]


def test_whoever_waits_is_given_what_another_process_has_refreshed_although_it_is_due_soon():
    with World() as world:
        source = world.warm_source()
        world.store.session = a_session(world.clock, 50)
        world.clock.advance(3000)  # the last quarter of both lives has begun
        source.reject(source.session.token)
        assert source.token(timeout=PATIENCE).value == value(50)
        assert world.issuer.asked == []


def test_ahead_of_time_it_is_refreshed_and_serves_if_that_fails():
    with World() as world:
        source = world.warm_source()
        world.store.session = other = a_session(world.clock, 50)
        world.clock.advance(3000)
        world.issuer.script.append(RefreshError("the issuer is away"))
        source.token()
        eventually(lambda: source.token().value == value(50))
        assert world.issuer.asked == [other]


@pytest.mark.parametrize("failures", [1, 3])
def test_after_failures_it_is_still_what_the_other_process_has_left_that_is_refreshed(failures):
    with World() as world:
        source = world.warm_source()
        world.store.session = theirs = a_session(world.clock, 50)
        world.clock.advance(7200)  # everybody has slept over its expiry
        world.issuer.script.extend(RefreshError("the network is not up yet") for _ in range(failures))
        for _ in range(failures):
            with pytest.raises(RefreshError):
                source.token(timeout=PATIENCE)
            world.clock.advance(40)
        assert source.token(timeout=PATIENCE).value == value(1)
        assert world.issuer.asked == [theirs] * (failures + 1)  # never the one of its own, which is spent


def test_many_sources_over_one_store_refresh_once_per_lifetime():
    clock = FakeClock()
    store = MemoryStore(a_session(clock))
    issuer = ScriptedIssuer(clock)
    sources = [RefreshingTokenSource(store, issuer, clock=clock) for _ in range(16)]
    for generation in range(1, 6):
        clock.advance(7200)
        tokens = in_threads(64, lambda i: sources[i % 16].token(timeout=PATIENCE))
        assert values(tokens) == {value(generation)}
        assert len(issuer.asked) == generation
    for source in sources:
        source.close()


def test_a_refresh_waits_for_whoever_holds_the_lock_and_callers_no_longer_than_their_time():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        with world.store.lock():
            waiting = in_background(lambda: source.token(timeout=PATIENCE))
            with pytest.raises(TimeoutError):
                source.token(timeout=0.02)
            assert world.issuer.asked == []
            world.store.session = a_session(world.clock, 70)  # the holder has refreshed
        assert waiting().value == value(70)
        assert world.issuer.asked == []


# Stores that fail


@pytest.mark.parametrize("failure", STORE_FAILURES, ids=repr)
@pytest.mark.parametrize("where", ["load", "lock", "unlock"])
def test_a_store_that_cannot_be_read_or_locked_at_first_is_told_and_heals(where, failure):
    with World() as world:
        world.clock.advance(7200)
        world.store.failing[where] = failure
        source = world.source()
        if where == "unlock":  # the token is there all the same
            assert source.token(timeout=PATIENCE).value == value(1)
        else:
            expected = StoreError if isinstance(failure, StoreError) else RefreshError
            for _ in range(3):
                with pytest.raises(expected):
                    source.token(timeout=PATIENCE)
            assert world.issuer.asked == []
        world.store.failing.clear()
        world.clock.advance(40)
        assert source.token(timeout=PATIENCE).value == value(1)
        assert len(world.issuer.asked) == 1


@pytest.mark.parametrize("failure", STORE_FAILURES, ids=repr)
@pytest.mark.parametrize("where", ["load", "lock"])
def test_a_store_that_fails_later_keeps_a_session_from_being_refreshed_twice_and_nobody_notices_while_the_token_works(
    where, failure
):
    with World() as world:
        source = world.warm_source()
        world.store.failing[where] = failure
        world.clock.advance(2800)
        for _ in range(10):
            assert source.token(timeout=PATIENCE).value == value(0)
            settled(source)
            world.clock.advance(31)
        world.clock.advance(600)
        with pytest.raises(AuthError):
            source.token(timeout=PATIENCE)
        # Another process may have used the refresh token meanwhile: it must not be presented unseen.
        assert world.issuer.asked == []
        world.store.failing.clear()
        world.clock.advance(40)
        assert source.token(timeout=PATIENCE).value == value(1)


@pytest.mark.parametrize("failure", STORE_FAILURES, ids=repr)
def test_a_session_that_cannot_be_saved_lives_on_and_is_saved_as_soon_as_it_can_be(failure, caplog):
    with World() as world, caplog.at_level(logging.WARNING):
        source = world.warm_source()
        world.store.failing["save"] = failure
        world.clock.advance(7200)
        assert source.token(timeout=PATIENCE).value == value(1)
        assert ["could not be saved" in record.message for record in caplog.records] == [True]
        world.store.failing.clear()
        world.clock.advance(61)
        eventually(lambda: world.store.session == world.issuer.issued[-1])


def test_a_save_that_fails_for_a_moment_is_made_before_the_lock_is_given_back(caplog):
    with World() as world, caplog.at_level(logging.WARNING):
        source = world.warm_source()
        world.clock.advance(7200)
        world.store.failing["save"] = OSError("busy")
        locked = []

        def pause(seconds):
            locked.append(world.store.locked)
            if len(locked) == 3:
                del world.store.failing["save"]

        source._pause = pause
        assert source.token(timeout=PATIENCE).value == value(1)
        assert locked == [True] * 3
        assert world.store.session == world.issuer.issued[0]
        assert caplog.records == []


def test_who_waits_for_the_lock_is_kept_waiting_for_seconds_at_most_and_once_an_outage():
    with World() as world:
        source = world.warm_source()
        world.store.failing["save"] = OSError("no space")
        for _ in range(3):
            world.clock.advance(7200)
            source.token(timeout=PATIENCE)
        assert 0.5 <= sum(world.pauses) <= 2


def test_a_store_that_takes_long_to_fail_is_not_tried_again_under_the_lock(monkeypatch):
    with World() as world:
        source = world.warm_source()
        world.store.failing["save"] = StoreError("no answer within 10 s")
        monkeypatch.setattr(refreshing, "_SAVE_SECONDS", 0.0)
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)
        assert world.pauses == []


def test_a_long_outage_of_the_store_is_worth_one_warning_and_the_next_outage_another(caplog):
    with World() as world, caplog.at_level(logging.WARNING):
        source = world.warm_source()
        for outage in (1, 2):
            world.store.failing["save"] = StoreError("gone")
            for _ in range(3):
                world.clock.advance(7200)
                source.token(timeout=PATIENCE)
            assert len(caplog.records) == outage
            # its own refresh token was used each time, not the one that the store holds
            assert world.issuer.asked[-1] == world.issuer.issued[-2]
            world.store.failing.clear()
            world.clock.advance(7200)
            source.token(timeout=PATIENCE)
            assert world.store.session == world.issuer.issued[-1]


def test_a_session_that_was_never_saved_survives_a_store_that_fails_altogether():
    with World() as world:
        source = world.warm_source()
        world.store.failing["save"] = StoreError("gone")
        world.clock.advance(7200)
        assert source.token(timeout=PATIENCE).value == value(1)
        world.store.failing["load"] = StoreError("gone")
        world.clock.advance(7200)
        assert source.token(timeout=PATIENCE).value == value(2)
        assert world.issuer.asked[-1] == world.issuer.issued[0]
        world.store.failing.clear()
        world.clock.advance(61)
        eventually(lambda: world.store.session == world.issuer.issued[-1])


def test_saving_is_tried_again_without_any_call():
    with World() as world:
        source = world.warm_source()
        world.store.failing["save"] = StoreError("gone")
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)
        saves = world.store.done.count("save")
        world.clock.advance(2)  # the wall clock goes on; the thread wakes by itself within about a second
        eventually(lambda: world.store.done.count("save") > saves)
        world.store.failing.clear()
        world.clock.advance(61)
        source.close()
        assert world.store.session == world.issuer.issued[-1]


@pytest.mark.parametrize("newer", ["login", "logout"])
def test_saving_again_does_not_overwrite_a_newer_login_or_undo_a_logout(newer):
    with World() as world:
        source = world.warm_source()
        world.store.failing["save"] = StoreError("gone")
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)
        theirs = a_session(world.clock, 90) if newer == "login" else None
        world.store.session = theirs
        world.store.failing.clear()
        source.close()
        assert world.store.session == theirs
        assert world.store.saved == []


def test_a_new_login_is_taken_over_although_the_present_session_could_not_be_saved():
    with World() as world:
        source = world.warm_source()
        world.store.failing["save"] = StoreError("gone")
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)
        world.clock.advance(7200)
        world.store.session = a_session(world.clock, 90)
        assert source.token(timeout=PATIENCE).value == value(90)
        assert len(world.issuer.asked) == 1


@pytest.mark.parametrize("meanwhile", ["a refresh", "only time"])
def test_a_session_of_its_own_that_was_saved_late_is_no_news_for_a_source_that_is_further_on(meanwhile):
    with World() as world:
        source = world.warm_source()
        world.store.failing["save"] = StoreError("the keyring did not answer")
        for _ in range(2):
            world.clock.advance(7200)
            source.token(timeout=PATIENCE)
        late, held = world.issuer.issued
        world.store.session = late  # somebody has answered the prompt
        if meanwhile == "a refresh":
            world.clock.advance(7200)
            assert source.token(timeout=PATIENCE).value == value(3)
            assert world.issuer.asked[-1] == held  # the late one's refresh token is spent
        world.store.failing.clear()
        source.close()
        assert world.store.session == world.issuer.issued[-1]


def test_close_saves_what_could_not_be_saved_before():
    with World() as world:
        source = world.warm_source()
        world.store.failing["save"] = StoreError("gone")
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)
        world.store.failing.clear()
        source.close()
        assert world.store.session == world.issuer.issued[-1]


def test_a_wall_clock_that_is_set_back_does_not_put_off_saving_for_long():
    with World() as world:
        source = world.warm_source()
        world.store.failing["save"] = StoreError("gone")
        world.clock.advance(7200)
        source.token(timeout=PATIENCE)
        world.clock.advance(-86400)
        assert source._seconds_to_next_save() <= 60


# A model of it all: an issuer that rotates refresh tokens and ends the session when one is used twice


class RotatingIssuer:
    def __init__(self, clock):
        self.clock = clock
        self.valid = set()
        self.used = set()
        self.reused = []
        self.count = 0
        self.down = False

    def login(self):
        self.count += 1
        session = a_session(self.clock, self.count, lifetime=3600.0)
        self.valid.add(session.refresh_token)
        return session

    def __call__(self, session):
        if session is None:
            raise LoginRequired("log in")
        if self.down:
            raise RefreshError("down")
        if session.refresh_token in self.used:
            self.reused.append(session.refresh_token)
            self.valid.clear()
        if session.refresh_token not in self.valid:
            raise LoginRequired("ended")
        self.valid.discard(session.refresh_token)
        self.used.add(session.refresh_token)
        return self.login()


class SourceModel(RuleBasedStateMachine):
    """Whatever happens in whatever order: no refresh token is used twice, and no token is given that is of no use."""

    @initialize(expiry=st.sampled_from([0.0, 3600.0]))
    def start(self, expiry):
        self.clock = FakeClock()
        self.issuer = RotatingIssuer(self.clock)
        self.store = ScriptedStore(self.issuer.login())
        self.clock.advance(expiry)
        self.source = RefreshingTokenSource(self.store, self.issuer, clock=self.clock)
        self.other = RefreshingTokenSource(self.store, self.issuer, clock=self.clock)
        self.rejected = set()

    def ask(self, source):
        try:
            token = source.token(timeout=PATIENCE)
        except AuthError as error:
            return error
        assert token.expires_at > self.clock(), "an expired token was handed out"
        return token

    @rule(seconds=st.sampled_from([0.5, 5.0, 40.0, 400.0, 2750.0, 3580.0, 4000.0]))
    def time_passes(self, seconds):
        self.clock.advance(seconds)

    @rule(which=st.booleans())
    def call(self, which):
        self.ask(self.source if which else self.other)

    @rule(which=st.booleans())
    def refused_call(self, which):
        source = self.source if which else self.other
        first = self.ask(source)
        if isinstance(first, AuthError):
            return
        source.reject(first)
        second = self.ask(source)
        if not isinstance(second, AuthError) and second.value != first.value:
            source.accept(second)

    @rule(which=st.booleans())
    def peek(self, which):
        token = (self.source if which else self.other).peek()
        assert token is None or token.expires_at > self.clock()

    @rule(down=st.booleans())
    def the_issuer_goes_down_or_comes_back(self, down):
        self.issuer.down = down

    @rule(where=st.sampled_from(["load", "lock"]))
    def the_store_fails(self, where):
        self.store.failing[where] = StoreError(where)

    @rule()
    def the_store_works_again(self):
        self.store.failing.clear()

    @rule()
    def somebody_logs_in(self):
        settled(self.source)
        settled(self.other)
        self.store.session = self.issuer.login()

    @rule()
    def somebody_logs_out(self):
        settled(self.source)
        settled(self.other)
        self.store.session = None

    @precondition(lambda self: hasattr(self, "source"))
    @rule()
    def all_is_well_again_and_so_are_calls(self):
        self.issuer.down = False
        self.store.failing.clear()
        settled(self.source)
        settled(self.other)
        if self.store.session is None or self.store.session.refresh_token not in self.issuer.valid:
            self.store.session = self.issuer.login()
        self.clock.advance(4000)
        for source in (self.source, self.other):
            answer = self.ask(source)
            assert not isinstance(answer, AuthError), f"not healed: {answer!r}"

    @invariant()
    def no_refresh_token_is_used_twice(self):
        if hasattr(self, "issuer"):
            assert self.issuer.reused == []

    def teardown(self):
        if hasattr(self, "source"):
            self.store.failing.clear()
            self.source.close()
            self.other.close()


SourceModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSourceModel = SourceModel.TestCase


def test_threads_over_two_sources_and_a_rotating_issuer_never_use_a_refresh_token_twice():
    clock = FakeClock()
    issuer = RotatingIssuer(clock)
    store = MemoryStore(issuer.login())
    sources = [RefreshingTokenSource(store, issuer, clock=clock) for _ in range(2)]
    lock = threading.Lock()

    def call(i):
        source = sources[i % 2]
        for step in range(60):
            token = source.token(timeout=PATIENCE)
            if (i + step) % 7 == 0:
                source.reject(token)
                source.accept(source.token(timeout=PATIENCE))
            if i == 0:
                with lock:
                    clock.advance(97)
        return "done"

    assert values(in_threads(16, call)) == {"done"}
    assert issuer.reused == []
    assert isinstance(store.load(), Session)
    for source in sources:
        source.close()

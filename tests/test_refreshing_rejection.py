"""Rule 7 and the contract of `reject`: one refresh for a thousand refusals, and no hammering of the issuer."""

from __future__ import annotations

import threading

import pytest
from conftest import eventually
from scripted import PATIENCE, World, a_session, in_background, in_threads, settled, value, values

from interceptors import LoginRequired, RefreshError, StoreError, Token


def refuse_everything(world, source, *, seconds, every):
    """Calls each `every` seconds, each refused: the token is rejected, the next one is tried once, rejected as well."""
    end = world.clock() + seconds
    while world.clock() < end:
        first = source.token(timeout=PATIENCE)
        source.reject(first)
        second = source.token(timeout=PATIENCE)
        if second.value != first.value:
            source.reject(second)
        world.clock.advance(every)


def test_a_rejected_token_is_not_handed_out_again():
    with World() as world:
        source = world.warm_source()
        rejected = source.token()
        source.reject(rejected)
        assert source.peek() is None
        assert source.token(timeout=PATIENCE).value == value(1)
        assert source.stats.reactive == 1
        assert source.stats.rejected == 1


def test_who_comes_after_a_rejection_waits_while_the_refresh_is_slow():
    with World() as world:
        source = world.warm_source()
        source.reject(source.token())
        with world.issuer.closed_gate():
            waiting = [in_background(lambda: source.token(timeout=PATIENCE)) for _ in range(5)]
            world.issuer.wait_for_request()
            with pytest.raises(TimeoutError):
                source.token(timeout=0.01)
        assert {wait().value for wait in waiting} == {value(1)}
        assert len(world.issuer.asked) == 1


def test_two_hundred_threads_that_are_refused_with_one_token_cost_one_refresh():
    with World() as world:
        source = world.warm_source()
        refused = source.token()

        def call(_):
            source.reject(refused)
            return source.token(timeout=PATIENCE)

        assert values(in_threads(200, call)) == {value(1)}
        assert len(world.issuer.asked) == 1
        assert source.stats.rejected == 1


def test_a_thousand_rejections_of_a_token_that_was_replaced_change_nothing():
    with World() as world:
        source = world.warm_source()
        old = source.token()
        source.reject(old)
        new = source.token(timeout=PATIENCE)
        for _ in range(1000):
            source.reject(old)
        assert source.peek() is new
        assert source.stats.rejected == 1
        assert len(world.issuer.asked) == 1


def test_a_rejection_of_a_token_that_it_never_had_or_before_the_first_changes_nothing():
    with World() as world:
        source = world.source()
        source.reject(Token("somebody-elses"))
        source.token(timeout=PATIENCE)
        source.reject(Token("somebody-elses"))
        assert source.peek().value == value(0)


def test_a_token_is_the_same_whoever_rejects_it():
    with World() as world:
        source = world.warm_source()
        source.reject(Token(value(0)))  # an equal value, another object, no expiry
        assert source.peek() is None


def test_a_token_that_is_rejected_during_its_proactive_refresh_costs_no_second_one():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(3000)
        stale = source.token()
        with world.issuer.closed_gate():
            source.peek()
            world.issuer.wait_for_request()
            source.reject(stale)
            assert source.peek() is None
            waiting = in_background(lambda: source.token(timeout=PATIENCE))
            with pytest.raises(TimeoutError):
                source.token(timeout=0.01)
        assert waiting().value == value(1)
        settled(source)
        assert len(world.issuer.asked) == 1


def test_a_token_that_is_rejected_before_the_round_that_yielded_it_ends_is_not_handed_to_who_waits():
    told = threading.Event()
    go_on = threading.Event()

    def on_refresh(session):
        if session.access_token == value(1):
            told.set()
            assert go_on.wait(PATIENCE)

    with World() as world:
        source = world.warm_source(on_refresh=on_refresh)
        world.clock.advance(7200)
        early = in_background(lambda: source.token(timeout=PATIENCE))
        assert told.wait(PATIENCE)
        source.reject(source.peek())
        late = in_background(lambda: source.token(timeout=PATIENCE))
        eventually(lambda: source._jobs.qsize() == 1)
        go_on.set()
        assert early().value == value(1)  # it asked before
        assert late().value == value(2)


# Back-off and cool-down


def test_while_refreshing_is_in_back_off_the_server_has_the_last_word_on_a_refused_token():
    with World() as world:
        source = world.warm_source()
        world.issuer.script.extend(ConnectionError("down") for _ in range(3))
        source.reject(source.token())
        for _ in range(100):
            assert source.token(timeout=PATIENCE).value == value(0)
        assert len(world.issuer.asked) == 1
        world.clock.advance(1)
        assert source.token(timeout=PATIENCE).value == value(0)
        assert len(world.issuer.asked) == 2


def test_a_refused_token_that_has_expired_is_not_handed_out_in_back_off():
    with World() as world:
        source = world.warm_source()
        source.reject(source.token())
        world.clock.advance(7200)
        world.issuer.script.append(ConnectionError("down"))
        for _ in range(3):
            with pytest.raises(RefreshError, match="ConnectionError"):
                source.token(timeout=PATIENCE)
        assert len(world.issuer.asked) == 1


def test_a_refused_token_is_not_handed_out_once_only_a_login_can_help():
    with World() as world:
        source = world.warm_source()
        world.issuer.script.append(LoginRequired("gone"))
        source.reject(source.token())
        for _ in range(3):
            with pytest.raises(LoginRequired, match="gone"):
                source.token(timeout=PATIENCE)
        world.store.failing["load"] = StoreError("cannot be read")
        for _ in range(3):
            with pytest.raises(LoginRequired, match="gone"):
                source.token(timeout=PATIENCE)
        assert len(world.issuer.asked) == 1


def test_a_token_from_a_forced_refresh_that_is_refused_as_well_begins_a_cool_down():
    with World() as world:
        source = world.warm_source()
        source.reject(source.token())
        forced = source.token(timeout=PATIENCE)
        source.reject(forced)
        for _ in range(100):
            assert source.peek() is forced
            source.reject(forced)
        assert len(world.issuer.asked) == 1
        world.clock.advance(1.01)
        source.reject(forced)
        assert source.peek() is None
        assert source.token(timeout=PATIENCE).value == value(2)
        assert source.stats.rejected == 2


@pytest.mark.parametrize("every", [0.05, 1.0, 7.0, 30.0, 299.0, 900.0])
def test_a_server_that_refuses_everything_for_an_hour_costs_few_refreshes(every):
    with World(lifetime=86400.0) as world:
        source = world.warm_source()
        refuse_everything(world, source, seconds=3600, every=every)
        # 1 + 2 + 4 + ... + 256 s, then every 300 s
        assert len(world.issuer.asked) <= 9 + 3600 / 300 + 1


def test_a_server_that_refuses_everything_heals_within_the_last_cool_down():
    with World(lifetime=86400.0) as world:
        source = world.warm_source()
        refuse_everything(world, source, seconds=3600, every=5)
        asked = len(world.issuer.asked)
        world.clock.advance(301)
        source.reject(source.token(timeout=PATIENCE))
        healed = source.token(timeout=PATIENCE)
        source.accept(healed)
        assert len(world.issuer.asked) == asked + 1
        # and the next legitimate revocation heals at once
        source.reject(healed)
        assert source.token(timeout=PATIENCE).value != healed.value


def test_a_login_during_a_cool_down_heals_within_a_second():
    with World(lifetime=86400.0) as world:
        source = world.warm_source()
        refuse_everything(world, source, seconds=1000, every=5)
        asked = len(world.issuer.asked)
        world.clock.advance(20)
        source.reject(source.peek())  # still in the cool-down
        settled(source)
        world.store.session = a_session(world.clock, 90)
        loads = world.store.done.count("load")
        for _ in range(50):
            source.reject(source.peek())
        settled(source)
        assert world.store.done.count("load") == loads
        world.clock.advance(1.01)
        source.reject(source.peek())
        eventually(lambda: source.peek().value == value(90))
        assert len(world.issuer.asked) == asked


def test_a_rejection_during_a_cool_down_costs_no_more_than_a_look_at_the_store():
    with World(lifetime=86400.0) as world:
        source = world.warm_source()
        refuse_everything(world, source, seconds=1000, every=5)
        asked, failures = len(world.issuer.asked), source.stats.failures
        token = source.peek()
        for failing in (False, True):
            if failing:
                world.store.failing["load"] = StoreError("unreadable")
            for _ in range(20):
                world.clock.advance(1.01)
                source.reject(token)
                assert source.peek() is source.token(timeout=0) is token
                settled(source)
        assert len(world.issuer.asked) == asked
        assert source.stats.failures == failures


def test_revocations_that_are_healed_in_between_each_heal_at_once():
    with World() as world:
        source = world.warm_source()
        for number in range(1, 50):
            source.reject(source.token(timeout=PATIENCE))
            healed = source.token(timeout=PATIENCE)
            assert healed.value == value(number)
            source.accept(healed)
            world.clock.advance(0.1)


def test_a_token_that_was_in_use_for_long_is_replaced_at_once_though_nobody_has_said_that_it_was_accepted():
    with World() as world:
        source = world.warm_source()
        source.reject(source.token())
        source.token(timeout=PATIENCE)  # whoever asked has given up meanwhile, others use it
        world.clock.advance(600)
        source.reject(source.token())
        assert source.token(timeout=PATIENCE).value == value(2)


def test_accepting_another_token_does_not_end_the_trial():
    with World() as world:
        source = world.warm_source()
        old = source.token()
        source.accept(old)
        source.reject(old)
        forced = source.token(timeout=PATIENCE)
        source.accept(old)
        source.accept(Token("somebody-elses"))
        source.reject(forced)
        assert source.peek() is forced  # in cool-down


def test_a_token_that_was_refreshed_ahead_of_time_is_not_on_trial():
    with World() as world:
        source = world.warm_source()
        world.clock.advance(7200)
        source.reject(source.token(timeout=PATIENCE))
        assert source.peek() is None
        assert source.token(timeout=PATIENCE).value == value(2)


def test_rejections_from_many_threads_over_many_generations_neither_hang_nor_hammer():
    with World(lifetime=86400.0) as world:
        source = world.warm_source()
        bad = {value(n) for n in range(0, 40, 2)}  # every second token is refused

        def call(_):
            for _ in range(50):
                token = source.token(timeout=PATIENCE)
                if token.value in bad:
                    source.reject(token)
                    again = source.token(timeout=PATIENCE)
                    if again.value in bad:
                        source.reject(again)
                    else:
                        source.accept(again)
            return "done"

        assert values(in_threads(16, call)) == {"done"}
        assert len(world.issuer.asked) <= 3


def test_an_issuer_that_answers_a_forced_refresh_with_the_same_token_is_not_asked_by_every_call():
    with World() as world:
        source = world.warm_source()
        same = world.store.session
        world.issuer.script.extend(a_session(world.clock) for _ in range(1000))
        assert same.access_token == world.issuer.script[0].access_token
        for _ in range(100):
            source.reject(source.token(timeout=PATIENCE))
        assert len(world.issuer.asked) <= 2

"""The rules that every flavour obeys, over every kind of RPC and every way in."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from behaviour_drivers import (
    EXPECTED,
    FLAVOURS,
    KINDS,
    RPC_ERRORS,
    WAYS,
    SlowSource,
    code_of,
    details_of,
    driving,
)
from conftest import eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interceptors import (
    LoginRequired,
    MemoryStore,
    OidcClient,
    RefreshError,
    RefreshingTokenSource,
    StaticTokenSource,
)


def pytest_generate_tests(metafunc):
    if "way" in metafunc.fixturenames:
        metafunc.parametrize(("flavour", "way"), [(flavour, way) for flavour in FLAVOURS for way in WAYS[flavour]])
    elif "flavour" in metafunc.fixturenames:
        metafunc.parametrize("flavour", FLAVOURS)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def driver(flavour, way, server, source):
    with driving(flavour, server, source, way) as driver:
        yield driver


@pytest.fixture
def call(driver, kind):
    """Makes a call of `kind` and checks that its answer is whole."""

    def make(**options):
        answer = getattr(driver, kind)(**options)
        assert answer == EXPECTED.get(kind, answer)
        return answer

    return make


def authorizations(served):
    return [value for key, value in served.metadata if key == "authorization"]


def test_rule_1_each_attempt_carries_one_token_and_the_callers_metadata_in_order(call, server, source):
    call(metadata=(("x-b", "1"), ("x-b", "3"), ("x-a", "2")))
    (served,) = server.calls
    assert authorizations(served) == [source.token().header]
    assert [pair for pair in served.metadata if pair[0].startswith("x-")] == [("x-b", "1"), ("x-b", "3"), ("x-a", "2")]


def test_rule_1_also_on_the_second_attempt(call, server, source):
    server.refuse_next()
    call(metadata=(("x-b", "1"), ("x-a", "2")))
    (served,) = server.calls
    assert authorizations(served) == [source.token().header]
    assert [pair for pair in served.metadata if pair[0].startswith("x-")] == [("x-b", "1"), ("x-a", "2")]


def test_rule_2_a_call_with_its_own_authorization_is_sent_untouched(call, server, issuer, source):
    with pytest.raises(RPC_ERRORS) as caught:
        call(metadata=(("authorization", "Bearer mine"),))
    # When a write meets the end of a call, grpc.aio itself says INTERNAL now and then.
    assert code_of(caught.value) in {"UNAUTHENTICATED", "INTERNAL"}
    assert (server.attempts, issuer.refreshes, source.stats.rejected) == (1, 0, 0)


def test_rule_3_a_refused_call_is_made_once_more_with_a_new_token(call, server, issuer, source):
    issuer.revoke(source.token().value)
    call()
    assert (server.attempts, server.refusals, len(server.calls)) == (2, 1, 1)
    assert issuer.refreshes == 1


def test_rule_3_a_second_refusal_is_the_callers_and_the_source_is_told(call, server, source):
    server.refuse_all()
    with pytest.raises(RPC_ERRORS) as caught:
        call()
    assert code_of(caught.value) == "UNAUTHENTICATED"
    assert server.attempts == 2
    assert source.stats.rejected == 2


@pytest.mark.parametrize("code", ["UNAVAILABLE", "PERMISSION_DENIED", "INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED"])
def test_rule_3_any_other_status_is_never_retried_here(call, server, source, code):
    server.refuse_next(code=code)
    with pytest.raises(RPC_ERRORS) as caught:
        call()
    assert code_of(caught.value) == code
    assert (server.attempts, source.stats.rejected) == (1, 0)


def test_rule_4_the_second_attempt_gets_what_is_left_of_the_timeout(flavour, way, kind, server, issuer):
    with SlowSource(issuer) as source, driving(flavour, server, source, way) as driver:
        server.refuse_next()
        source.hold()
        with ThreadPoolExecutor(1) as pool:
            calling = pool.submit(getattr(driver, kind), timeout=5)
            assert source.waited_for(0.3)
            source.release()
            calling.result(20)
        (served,) = server.calls
        assert 0 < served.time_remaining < 4.75


def test_rule_4_waiting_for_a_refresh_counts_and_then_there_is_no_second_attempt(flavour, way, kind, server, issuer):
    with SlowSource(issuer) as source, driving(flavour, server, source, way) as driver:
        server.refuse_next()
        source.hold()
        with pytest.raises(RPC_ERRORS) as caught:
            getattr(driver, kind)(timeout=0.4)
        assert code_of(caught.value) == "DEADLINE_EXCEEDED"
        assert server.attempts == 1


def test_rule_4_waiting_for_the_first_token_counts(flavour, way, kind, server, issuer):
    with SlowSource(issuer) as source, driving(flavour, server, source, way) as driver:
        source.reject(source.token())
        source.hold()
        with pytest.raises(RPC_ERRORS) as caught:
            getattr(driver, kind)(timeout=0.3)
        assert code_of(caught.value) == "DEADLINE_EXCEEDED"
        assert server.attempts == 0


@pytest.mark.parametrize("after", [1, 2, 3])
def test_rule_5_a_client_stream_is_replayed_whole(driver, server, after):
    server.refuse_next(after_messages=after)
    assert driver.client_stream() == ["1", "2", "3"]
    assert server.event_ids == ["1", "2", "3"]


def test_rule_5_over_the_replay_limit_the_refusal_is_the_callers_and_the_next_call_works(flavour, way, server, source):
    with driving(flavour, server, source, way, replay_limit=200) as driver:
        server.refuse_next(after_messages=50)
        with pytest.raises(RPC_ERRORS) as caught:
            driver.client_stream([str(i) for i in range(60)])
        assert code_of(caught.value) == "UNAUTHENTICATED"
        assert source.stats.rejected == 1
        assert server.attempts == 1
        driver.client_stream([str(i) for i in range(60)])
        assert server.event_ids == [str(i) for i in range(60)]


def test_after_a_refusal_that_could_not_be_retried_the_next_revoked_token_is_replaced_at_once(call, issuer, source):
    source.reject(source.token())
    call()
    issuer.revoke(source.token().value)
    call()
    assert source.stats.reactive == 2


def test_rule_6_nothing_is_retried_after_the_first_response_and_the_source_is_told(driver, server, source):
    server.refuse_next(after_messages=2)
    seen, error = driver.first_responses(5)
    assert seen in ([1, 2], [1])  # the last one may be overtaken by the end of the stream
    assert code_of(error) == "UNAUTHENTICATED"
    assert (server.attempts, source.stats.rejected) == (1, 1)


def test_rule_8_if_the_refresh_fails_the_caller_gets_the_refusal_and_the_cause(call, server, issuer, source):
    issuer.revoke(source.token().value)
    issuer.fail_next(5)
    with pytest.raises(RPC_ERRORS) as caught:
        call()
    assert code_of(caught.value) == "UNAUTHENTICATED"
    assert "revoked" in details_of(caught.value)
    assert server.attempts == 1


def test_rule_8_if_the_session_is_dead_the_refusal_says_so_in_its_cause(call, server, issuer, source):
    issuer.revoke(source.token().value)
    issuer.end_session(source.session)
    with pytest.raises(RPC_ERRORS) as caught:
        call()
    assert code_of(caught.value) == "UNAUTHENTICATED"
    assert isinstance(caught.value.__cause__, LoginRequired)


def test_rule_8_without_any_token_the_error_says_to_log_in(flavour, way, kind, server, issuer):
    client = OidcClient(issuer.url, issuer.client_id)
    with (
        RefreshingTokenSource(MemoryStore(), client.refresh) as source,
        driving(flavour, server, source, way) as driver,
    ):
        with pytest.raises(RPC_ERRORS) as caught:
            getattr(driver, kind)()
        assert code_of(caught.value) == "UNAUTHENTICATED"
        assert "interceptors login" in details_of(caught.value)
        assert isinstance(caught.value.__cause__, LoginRequired)
        assert server.attempts == 0


def test_rule_8_when_the_issuer_cannot_be_reached_the_error_is_unavailable(flavour, way, kind, server, issuer):
    client = OidcClient(issuer.url, issuer.client_id, timeout=5)
    session = issuer.session()
    session = dataclasses.replace(session, expires_at=session.issued_at)
    with (
        issuer.down(),
        RefreshingTokenSource(MemoryStore(session), client.refresh) as source,
        driving(flavour, server, source, way) as driver,
    ):
        with pytest.raises(RPC_ERRORS) as caught:
            getattr(driver, kind)()
        assert code_of(caught.value) == "UNAVAILABLE"
        assert isinstance(caught.value.__cause__, RefreshError)


def test_rule_10_no_error_shows_a_token(flavour, way, kind, server):
    with driving(flavour, server, StaticTokenSource("s3cret"), way) as driver:
        for options in ({}, {"metadata": (("InVaLiD key", "x"),)}, {"timeout": 0.0}):
            with pytest.raises(Exception) as caught:
                getattr(driver, kind)(**options)
            error = caught.value
            while error is not None:
                assert "s3cret" not in f"{error!r} {error}"
                error = error.__cause__ or error.__context__


def test_two_hundred_threads_meet_one_revoked_token_and_cost_one_refresh(flavour, server, issuer, source):
    issuer.revoke(source.token().value)
    with driving(flavour, server, source) as driver, ThreadPoolExecutor(200) as pool:
        list(pool.map(driver.unary, range(200)))
    assert issuer.refreshes == 1
    assert len(server.calls) == 200


def test_a_slow_refresh_inside_the_window_delays_no_call(flavour, kind, server, issuer):
    issuer.access_token_lifetime = 60.0
    session = issuer.session()
    now = [session.issued_at]
    client = OidcClient(issuer.url, issuer.client_id)
    with (
        RefreshingTokenSource(MemoryStore(session), client.refresh, clock=lambda: now[0]) as source,
        driving(flavour, server, source) as driver,
    ):
        source.token()
        issuer.hold()
        now[0] += 50
        getattr(driver, kind)()
        issuer.wait_for_token_requests(1)
        for _ in range(5):
            getattr(driver, kind)()
        assert issuer.refreshes == 0
        issuer.release()
        eventually(lambda: issuer.refreshes == 1)
    assert len(server.calls) == 6


def test_a_server_that_refuses_everything_causes_a_bounded_number_of_refreshes(call, server, issuer):
    server.refuse_all()
    for _ in range(30):
        with pytest.raises(RPC_ERRORS):
            call()
    assert issuer.refreshes <= 3


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(0, 20), refused_after=st.integers(1, 20), kind=st.sampled_from(["client_stream", "bidi"]))
def test_any_stream_refused_at_any_point_arrives_once_and_in_order(
    flavour, server, issuer, source, count, refused_after, kind
):
    ids = [str(i) for i in range(count)]
    before = len(server.calls)
    refused_after = 1 if kind == "bidi" else refused_after
    server.refuse_next(after_messages=refused_after)
    with driving(flavour, server, source) as driver:
        assert getattr(driver, kind)(ids) == ids
        driver.client_stream(["used-up"] * 20) if count < refused_after else None
    served = server.calls[before]
    assert list(served.event_ids) == ids


def test_a_message_that_is_changed_after_handing_it_over_is_replayed_as_it_was_sent(server, source):
    from interceptors.gen.kontext.agent.v1 import event_pb2

    server.refuse_next(after_messages=3)

    def reusing():
        request = event_pb2.IngestEventsRequest()
        for i in range(5):
            request.event.event_id = str(i)
            yield request

    with driving("grpc", server, source) as driver:
        assert list(driver.events.IngestEvents(reusing()).event_ids) == list("01234")


def test_the_first_attempts_thread_may_be_inside_next_while_the_second_starts(server, source):
    from interceptors.gen.kontext.agent.v1 import event_pb2

    server.refuse_next(after_messages=1)
    refused = threading.Event()
    pulled = []

    def requests():
        for i in range(4):
            if i == 1:
                # The first attempt's thread waits here while its call is refused and made again.
                assert refused.wait(10)
            pulled.append(i)
            yield event_pb2.StreamHookEventsRequest(event=event_pb2.HookEvent(event_id=str(i)))

    with driving("grpc", server, source) as driver:
        call = driver.events.StreamHookEvents(requests())
        server.wait_for(lambda: server.attempts == 2)
        refused.set()
        assert [response.event_id for response in call] == list("0123")
    assert pulled == [0, 1, 2, 3]
    assert server.event_ids == list("0123")

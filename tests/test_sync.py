"""grpc sync: what a caller does with the call objects, and what happens on threads."""

from __future__ import annotations

import gc
import queue
import sys
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from abandoned import serving_the_abandoned
from behaviour_drivers import SlowSource
from conftest import eventually
from connect_drivers import event

from interceptors import (
    BearerInterceptor,
    CallableTokenSource,
    LoginRequired,
    StaticTokenSource,
    TokenSource,
    intercept_channel,
    intercept_stub,
)
from interceptors.gen.kontext.agent.v1 import event_pb2, event_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc

REQUEST = heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=7)
WATCH = heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=3)
WAYS = ("intercept_channel", "intercept_stub", "native")


class Stubs:
    def __init__(self, server, source, way="intercept_channel", **options):
        self.plain = grpc.insecure_channel(server.target)
        channel = self.plain
        if way == "intercept_channel":
            channel = intercept_channel(channel, source, **options)
        elif way == "native":
            channel = grpc.intercept_channel(channel, BearerInterceptor(source, **options))
        self.channel = channel
        self.heartbeats = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
        self.events = event_pb2_grpc.EventServiceStub(channel)
        if way == "intercept_stub":
            self.heartbeats = intercept_stub(self.heartbeats, source, **options)
            self.events = intercept_stub(self.events, source, **options)


@pytest.fixture(params=WAYS)
def stubs(request, server, source):
    stubs = Stubs(server, source, request.param)
    yield stubs
    stubs.channel.close()


class Telling(TokenSource):
    """Has an error instead of a token."""

    def __init__(self, error):
        self._error = error

    def token(self, *, timeout=None):
        raise self._error


@pytest.fixture
def slow(issuer):
    with SlowSource(issuer) as slow:
        yield slow


def uploads(*ids):
    return (event_pb2.IngestEventsRequest(event=event(each)) for each in ids)


def said(*ids):
    return (event_pb2.StreamHookEventsRequest(event=event(each)) for each in ids)


# What comes back is a real call


def test_with_call_describes_the_final_attempt(stubs, server):
    server.refuse_next()
    response, call = stubs.heartbeats.Heartbeat.with_call(REQUEST, timeout=10)
    assert response.sequence == 7
    assert call.code() is grpc.StatusCode.OK
    assert isinstance(call, grpc.Call)
    server.refuse_next()
    response, call = stubs.events.IngestEvents.with_call(uploads("1"), timeout=10)
    assert (list(response.event_ids), call.code()) == (["1"], grpc.StatusCode.OK)


@pytest.mark.parametrize("refused", [0, 1])
def test_a_future_is_one(stubs, server, refused):
    for _ in range(refused):
        server.refuse_next()
    done, called = threading.Event(), []
    future = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=10)
    assert isinstance(future, grpc.Future)
    future.add_done_callback(lambda it: (called.append(it), done.set()))
    assert future.result(10).sequence == 7
    assert done.wait(10)
    assert called == [future]
    assert future.done()
    assert not future.running()
    assert not future.cancelled()
    assert future.exception(1) is None
    assert future.traceback(1) is None
    assert future.code() is grpc.StatusCode.OK
    late = []
    future.add_done_callback(late.append)
    assert late == [future]


def test_a_futures_error_is_that_of_the_second_attempt(stubs, server):
    server.refuse_next(details="first")
    server.refuse_next(details="second")
    future = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=10)
    error = future.exception(10)
    assert isinstance(error, grpc.RpcError)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, "second")
    with pytest.raises(grpc.RpcError) as caught:
        future.result()
    assert caught.value.details() == "second"
    assert future.traceback() is not None


def test_a_future_times_out_without_ending(stubs, server):
    server.hold()
    future = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=20)
    with pytest.raises(grpc.FutureTimeoutError):
        future.result(0.05)
    assert future.running()
    server.release()
    assert future.result(10).sequence == 7


def test_a_stream_is_iterated_once_and_tells_of_its_end(stubs, server):
    server.refuse_next()
    call = stubs.heartbeats.WatchSession(WATCH, timeout=10)
    assert call.is_active()
    assert 0 < call.time_remaining() <= 10
    assert [each.sequence for each in call] == [1, 2, 3]
    assert list(call) == []
    assert call.code() is grpc.StatusCode.OK
    assert not call.is_active()
    assert call.add_callback(lambda: None) is False


def test_two_hundred_callbacks_fire_once_each(stubs, server):
    server.refuse_next()
    server.hold()
    future = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=10)
    fired = queue.SimpleQueue()
    for _ in range(200):
        future.add_done_callback(lambda _: fired.put(1))
    server.release()
    assert sum(fired.get(timeout=10) for _ in range(200)) == 200
    assert fired.empty()


# Nobody is blocked who should not be


def test_future_and_streams_return_at_once_while_the_refresh_is_slow(server, slow):
    stubs = Stubs(server, slow)
    slow.reject(slow.peek())
    slow.hold()
    started = time.monotonic()
    calls = [
        stubs.heartbeats.Heartbeat.future(REQUEST, timeout=20),
        stubs.heartbeats.WatchSession(WATCH, timeout=20),
        stubs.events.IngestEvents.future(uploads("1"), timeout=20),
        stubs.events.StreamHookEvents(said("2"), timeout=20),
    ]
    assert time.monotonic() - started < 1
    assert all(call.is_active() for call in calls)
    slow.release()
    assert calls[0].result(10).sequence == 7
    assert len(list(calls[1])) == 3
    assert calls[2].result(10).accepted == 1
    assert len(list(calls[3])) == 1
    stubs.channel.close()


def test_grpcs_own_threads_serve_others_while_a_refresh_is_slow(server, issuer, slow):
    stubs = Stubs(server, slow)
    with grpc.insecure_channel(server.target) as other:
        bystander = intercept_channel(other, StaticTokenSource(slow.peek().value))
        issuer.revoke(slow.peek().value)
        good = StaticTokenSource(issuer.session().access_token)
        slow.hold()
        waiting = [stubs.heartbeats.Heartbeat.future(REQUEST, timeout=20) for _ in range(20)]
        assert slow.waited_for(0)
        heartbeat = heartbeat_pb2_grpc.HeartbeatServiceStub(intercept_channel(bystander._channel, good)).Heartbeat
        started = time.monotonic()
        assert all(heartbeat.future(REQUEST, timeout=10).result(10).sequence == 7 for _ in range(20))
        assert time.monotonic() - started < 5
        slow.release()
        assert all(future.result(10).sequence == 7 for future in waiting)
    stubs.channel.close()


# Cancelling


def test_cancelling_stops_the_attempt_in_flight(stubs, server):
    server.hold()
    future = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=20)
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(grpc.FutureCancelledError):
        future.result(10)
    assert future.code() is grpc.StatusCode.CANCELLED
    server.release()


def test_cancelling_stops_a_pending_retry(server, slow):
    stubs = Stubs(server, slow)
    server.refuse_next()
    slow.hold()
    future = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=20)
    assert slow.waited_for(0)
    future.cancel()
    with pytest.raises(grpc.FutureCancelledError):
        future.result(10)
    slow.release()
    assert (server.attempts, server.calls) == (1, [])
    stubs.channel.close()


def test_cancelling_stops_the_pulling_of_requests(stubs, server):
    pulled, ended = queue.SimpleQueue(), threading.Event()

    def requests():
        try:
            for number in range(100_000):
                pulled.put(number)
                yield event_pb2.StreamHookEventsRequest(event=event(number))
                time.sleep(0.001)
        finally:
            ended.set()

    call = stubs.events.StreamHookEvents(requests(), timeout=20)
    assert next(call).event_id == "0"
    call.cancel()
    # The iterator is closed as well, although the call is still held.
    assert ended.wait(10)
    assert pulled.qsize() < 100_000
    assert call.cancelled()


def test_a_call_that_is_over_does_not_keep_the_callers_iterator(stubs, server):
    ended = threading.Event()

    def requests():
        try:
            yield from uploads("1")
            yield from uploads("2")
        finally:
            ended.set()

    server.refuse_next(after_messages=1, code="INVALID_ARGUMENT")
    future = stubs.events.IngestEvents.future(requests(), timeout=20)
    assert future.exception(10).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ended.wait(10)


@pytest.mark.parametrize("way", ["intercept_channel", "intercept_stub"])
def test_a_call_that_is_over_does_not_keep_its_messages(server, source, way):
    stubs = Stubs(server, source, way)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = []
        for _ in range(20):
            large = heartbeat_pb2.HeartbeatRequest(session_id="s" * 200_000)
            kept.append(stubs.heartbeats.Heartbeat.future(large, timeout=20))
            kept.append(stubs.events.IngestEvents.future(uploads(*["e" * 10_000] * 10), timeout=20))
            kept[-2].result(20)
            kept[-1].result(20)
        del large
        server.calls.clear()
        gc.collect()
        # Responses of 2 MB, not requests of 6 MB.
        eventually(lambda: tracemalloc.get_traced_memory()[0] - before < 4_000_000)
    finally:
        tracemalloc.stop()
    stubs.channel.close()


@pytest.mark.parametrize("kind", ["future", "stream"])
@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_nobody_holds_any_more_is_cancelled(way, kind):
    with serving_the_abandoned() as server:
        stubs = Stubs(server, StaticTokenSource("token"), way)
        if kind == "future":
            call = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=20)
        else:
            call = stubs.heartbeats.WatchSession(WATCH, timeout=20)
            next(call)
        assert server.begun.wait(10)
        gone = weakref.ref(call)
        del call
        gc.collect()
        assert gone() is None
        assert server.ended.wait(10)
        stubs.channel.close()


# Waiting for a token


def test_callbacks_may_block_without_holding_up_other_calls(server, slow):
    """Not even where a call ends because its time is up while it waits for a token."""
    slow.reject(slow.peek())
    slow.hold()
    stubs = Stubs(server, slow)
    blocked, called = threading.Event(), threading.Event()
    first = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=0.05)
    first.add_done_callback(lambda _: (called.set(), blocked.wait(20)))
    assert called.wait(10)
    second = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=0.05)
    assert second.exception(10).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    blocked.set()
    stubs.channel.close()


def test_a_callback_may_make_a_call_that_waits_for_the_same_source(server, issuer):
    answers = iter([OSError("the issuer is down")])

    def token(force_refresh):
        for error in answers:
            raise error
        return issuer.session().access_token

    stubs = Stubs(server, CallableTokenSource(token))
    seen, called = [], threading.Event()

    def callback(future):
        seen.append(stubs.heartbeats.Heartbeat(REQUEST, timeout=10).sequence)
        called.set()

    future = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=10)
    future.add_done_callback(callback)
    assert future.exception(10).code() is grpc.StatusCode.UNAVAILABLE
    assert called.wait(10)
    assert seen == [7]
    stubs.channel.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_exits_ends_no_thread_of_ours(server, slow):
    slow.reject(slow.peek())
    slow.hold()
    stubs = Stubs(server, slow)
    called = threading.Event()

    def leave(_):
        called.set()
        sys.exit()

    first = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=0.05)
    first.add_done_callback(leave)
    assert called.wait(10)
    second = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=0.05)
    assert second.exception(10).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stubs.channel.close()


def test_calls_that_ended_before_their_deadline_leave_nothing_behind(server, issuer):
    value = issuer.session().access_token
    source = CallableTokenSource(lambda force_refresh: value)
    stubs = Stubs(server, source)
    for _ in range(3):
        stubs.heartbeats.Heartbeat.future(REQUEST, timeout=3600).result(10)
    stubs.channel.close()
    gone = weakref.ref(source)
    del source, stubs
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("phase", ["the first token", "the refresh"])
@pytest.mark.parametrize("closing", ["close", "with"])
def test_closing_the_channel_ends_calls_that_wait_for_a_token(server, slow, phase, closing):
    slow.hold()
    stubs = Stubs(server, slow)
    if phase == "the refresh":
        server.refuse_next()
    else:
        slow.reject(slow.peek())
    future = stubs.heartbeats.Heartbeat.future(REQUEST, timeout=20)
    assert slow.waited_for(0)
    if closing == "close":
        stubs.channel.close()
    else:
        with stubs.channel:
            pass
    assert future.exception(10).code() is grpc.StatusCode.CANCELLED
    assert "Channel closed" in future.details()


def test_a_single_threaded_stream_without_a_token_yet_can_be_asked_without_hanging(server, slow):
    slow.reject(slow.peek())
    slow.hold()
    options = [(grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)]
    with grpc.insecure_channel(server.target, options=options) as plain:
        stub = heartbeat_pb2_grpc.HeartbeatServiceStub(intercept_channel(plain, slow))
        call = stub.WatchSession(WATCH, timeout=20)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(call.code)
            assert slow.waited_for(0)
            slow.release()
            assert type(asking.exception(10)).__name__ == "UsageError"
        assert [response.sequence for response in call] == [1, 2, 3]


def test_an_error_that_no_server_sent_has_all_that_grpcs_errors_have(server):
    stubs = Stubs(server, Telling(LoginRequired("nobody is logged in")))
    with pytest.raises(grpc.RpcError) as caught:
        stubs.heartbeats.Heartbeat(REQUEST)
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert isinstance(error, grpc.Future)
    called = []
    error.add_done_callback(called.append)
    assert called == [error]
    assert (error.done(), error.running(), error.cancelled()) == (True, False, False)
    assert error.exception() is error
    assert error.traceback() is not None
    with pytest.raises(grpc.RpcError):
        error.result()
    stubs.channel.close()


# What interceptors beneath do


class Raising(grpc.UnaryUnaryClientInterceptor, grpc.StreamUnaryClientInterceptor):
    def __init__(self, error):
        self.error = error

    def intercept_unary_unary(self, continuation, client_call_details, request):
        raise self.error

    intercept_stream_unary = intercept_unary_unary


@pytest.mark.parametrize("error", [grpc.RpcError("the circuit is open"), RuntimeError("beneath")])
def test_what_an_interceptor_beneath_raises_is_the_callers(server, source, error):
    with grpc.insecure_channel(server.target) as plain:
        channel = intercept_channel(grpc.intercept_channel(plain, Raising(error)), source)
        heartbeats = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
        events = event_pb2_grpc.EventServiceStub(channel)
        for call in (
            lambda: heartbeats.Heartbeat(REQUEST),
            lambda: heartbeats.Heartbeat.with_call(REQUEST),
            lambda: events.IngestEvents(uploads("1")),
        ):
            with pytest.raises(type(error)) as caught:
                call()
            assert caught.value is error
        if not isinstance(error, grpc.RpcError):
            future = heartbeats.Heartbeat.future(REQUEST)
            assert future.exception(10) is error
            with pytest.raises(RuntimeError, match="beneath"):
                future.result(10)


# Streams


@pytest.mark.parametrize("after", [0, 1])
def test_a_ping_pong_is_replayed_without_losing_or_doubling(stubs, server, after):
    server.refuse_next(after_messages=after)
    outgoing = queue.SimpleQueue()
    call = stubs.events.StreamHookEvents(iter(outgoing.get, None), timeout=20)
    for number in range(20):
        outgoing.put(event_pb2.StreamHookEventsRequest(event=event(number)))
        assert next(call).event_id == str(number)
    outgoing.put(None)
    assert list(call) == []
    assert server.event_ids == [str(number) for number in range(20)]
    assert server.attempts == 2


def test_what_the_request_iterator_raises_ends_the_call_and_is_not_retried(stubs, server):
    def requests():
        yield from uploads("1")
        raise ValueError("the caller's own mistake")

    with pytest.raises(grpc.RpcError):
        stubs.events.IngestEvents(requests(), timeout=10)
    assert server.attempts <= 1


def test_many_threads_stream_while_tokens_are_revoked(server, issuer, source):
    stubs = Stubs(server, source)
    stop = threading.Event()

    def stream(thread):
        sent = []
        while not stop.is_set():
            ids = [f"{thread}-{len(sent)}-{each}" for each in range(5)]
            sent += ids
            assert list(stubs.events.IngestEvents(uploads(*ids), timeout=20).event_ids) == ids
        return sent

    with ThreadPoolExecutor(8) as threads:
        streams = [threads.submit(stream, thread) for thread in range(8)]
        for _ in range(5):
            token = source.token().value

            def used_by_all(token=token):
                calls = [call.event_ids[0].split("-")[0] for call in server.calls if call.token == token]
                return all(calls.count(str(thread)) >= 2 for thread in range(8))

            # A new token that is refused before it has been of any use would mean that refreshing does not help.
            server.wait_for(used_by_all, 30)
            issuer.revoke(token)
            eventually(lambda token=token: source.token().value != token, 30)
        stop.set()
        sent = [each for streamed in streams for each in streamed.result(20)]
    assert sorted(server.event_ids) == sorted(sent)
    stubs.channel.close()


# Errors


class Broken(TokenSource):
    def token(self, *, timeout=None):
        raise RuntimeError("s3cr3t-value")


@pytest.mark.parametrize("way", WAYS)
def test_a_source_that_breaks_its_contract_fails_the_call_and_hangs_nobody(server, way):
    stubs = Stubs(server, Broken(), way)
    for call in (
        lambda: stubs.heartbeats.Heartbeat(REQUEST, timeout=5),
        lambda: stubs.heartbeats.Heartbeat.future(REQUEST, timeout=5).result(5),
        lambda: list(stubs.heartbeats.WatchSession(WATCH, timeout=5)),
        lambda: stubs.events.IngestEvents(uploads("1"), timeout=5),
        lambda: list(stubs.events.StreamHookEvents(said("1"), timeout=5)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert "s3cr3t-value" not in caught.value.details()
    assert server.attempts == 0
    stubs.channel.close()


def test_metadata_that_grpc_refuses_is_an_error_without_the_token(server, source):
    stubs = Stubs(server, source)
    bad = {"metadata": (("No Such Key", "x"),), "timeout": 5}
    for call in (
        lambda: stubs.heartbeats.Heartbeat(REQUEST, **bad),
        lambda: stubs.heartbeats.Heartbeat.future(REQUEST, **bad).result(5),
        lambda: list(stubs.heartbeats.WatchSession(WATCH, **bad)),
        lambda: stubs.events.IngestEvents(uploads("1"), **bad),
        lambda: list(stubs.events.StreamHookEvents(said("1"), **bad)),
    ):
        with pytest.raises((ValueError, TypeError, grpc.RpcError)) as caught:  # by release of gRPC
            call()
        assert source.token().value not in f"{caught.value!s} {caught.value!r}"
    assert server.attempts == 0
    stubs.channel.close()


def test_a_call_on_a_closed_channel_fails_as_on_a_plain_one(server, source):
    stubs = Stubs(server, source)
    stubs.channel.close()
    with pytest.raises(ValueError, match="closed"):
        stubs.heartbeats.Heartbeat(REQUEST, timeout=5)

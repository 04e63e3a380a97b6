"""grpc sync: what a caller does with the call objects, and what happens on threads."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from behaviour_drivers import SlowSource
from conftest import eventually
from connect_drivers import event

from interceptors import BearerInterceptor, StaticTokenSource, TokenSource, intercept_channel, intercept_stub
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
    del call
    count = -1

    def still():
        nonlocal count
        count, before = pulled.qsize(), count
        return count == before

    eventually(still)
    assert count < 100_000


def test_a_call_that_nobody_holds_any_more_is_cancelled(server, source):
    stubs = Stubs(server, source)
    call = stubs.heartbeats.WatchSession(heartbeat_pb2.WatchSessionRequest(session_id="s"), timeout=20)
    next(call)
    gone = weakref.ref(call)
    del call
    gc.collect()
    assert gone() is None
    stubs.channel.close()


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
        with pytest.raises((ValueError, grpc.RpcError)) as caught:
            call()
        assert source.token().value not in f"{caught.value!s} {caught.value!r}"
    assert server.attempts == 0
    stubs.channel.close()


def test_a_call_on_a_closed_channel_fails_as_on_a_plain_one(server, source):
    stubs = Stubs(server, source)
    stubs.channel.close()
    with pytest.raises(ValueError, match="closed"):
        stubs.heartbeats.Heartbeat(REQUEST, timeout=5)

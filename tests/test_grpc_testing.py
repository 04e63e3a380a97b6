"""The sync flavour over grpc_testing's channel: the server's side is played by the test, step by step."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc_testing
import pytest
from conftest import eventually

from interceptors import CallableTokenSource, intercept_channel
from interceptors.gen.kontext.agent.v1 import event_pb2, event_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc

HEARTBEATS = heartbeat_pb2.DESCRIPTOR.services_by_name["HeartbeatService"]
EVENTS = event_pb2.DESCRIPTOR.services_by_name["EventService"]
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
REQUEST = heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=7)
TOKENS = {False: "first", True: "second"}


def heartbeats(sequence):
    return heartbeat_pb2.HeartbeatResponse(sequence=sequence)


def events(*ids):
    return [event_pb2.IngestEventsRequest(event=event_pb2.HookEvent(event_id=each)) for each in ids]


def bearer(metadata):
    return [value for key, value in metadata if key == "authorization"]


@pytest.fixture
def fake():
    return grpc_testing.channel([HEARTBEATS, EVENTS], grpc_testing.strict_real_time())


@pytest.fixture
def forced():
    return []


@pytest.fixture
def channel(fake, forced):
    def token(force_refresh):
        if force_refresh:
            forced.append(True)
        return TOKENS[bool(forced)]

    return intercept_channel(fake, CallableTokenSource(token))


@pytest.fixture
def client():
    with ThreadPoolExecutor(1) as client:
        yield client


def test_a_unary_call_carries_the_token_and_its_message(fake, channel, client):
    answer = client.submit(heartbeat_pb2_grpc.HeartbeatServiceStub(channel).Heartbeat, REQUEST)
    metadata, request, rpc = fake.take_unary_unary(HEARTBEATS.methods_by_name["Heartbeat"])
    assert bearer(metadata) == ["Bearer first"]
    assert request == REQUEST
    rpc.terminate(heartbeats(7), (), grpc.StatusCode.OK, "")
    assert answer.result(10).sequence == 7


@pytest.mark.parametrize("way", ["__call__", "with_call", "future"])
def test_a_refused_unary_call_is_sent_again_with_its_message_and_metadata(fake, channel, client, forced, way):
    multicallable = heartbeat_pb2_grpc.HeartbeatServiceStub(channel).Heartbeat

    def call():
        answer = getattr(multicallable, way)(REQUEST, metadata=(("x-a", "1"),))
        if way == "future":
            return answer.result()
        return answer[0] if way == "with_call" else answer

    answer = client.submit(call)
    method = HEARTBEATS.methods_by_name["Heartbeat"]
    _, _, rpc = fake.take_unary_unary(method)
    rpc.terminate(None, (), UNAUTHENTICATED, "stale")
    metadata, request, rpc = fake.take_unary_unary(method)
    assert bearer(metadata) == ["Bearer second"]
    assert ("x-a", "1") in metadata
    assert request == REQUEST
    rpc.terminate(heartbeats(7), (), grpc.StatusCode.OK, "")
    assert answer.result(10).sequence == 7
    assert forced == [True]


def test_a_second_refusal_is_the_callers(fake, channel, client):
    answer = client.submit(heartbeat_pb2_grpc.HeartbeatServiceStub(channel).Heartbeat, REQUEST)
    for details in ("stale", "stale again"):
        _, _, rpc = fake.take_unary_unary(HEARTBEATS.methods_by_name["Heartbeat"])
        rpc.terminate(None, (), UNAUTHENTICATED, details)
    with pytest.raises(grpc.RpcError) as caught:
        answer.result(10)
    assert (caught.value.code(), caught.value.details()) == (UNAUTHENTICATED, "stale again")


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code not in {grpc.StatusCode.OK, UNAUTHENTICATED}]
)
def test_any_other_status_is_the_callers_at_once(fake, channel, client, forced, code):
    answer = client.submit(heartbeat_pb2_grpc.HeartbeatServiceStub(channel).Heartbeat, REQUEST)
    _, _, rpc = fake.take_unary_unary(HEARTBEATS.methods_by_name["Heartbeat"])
    rpc.terminate(None, (), code, "no")
    with pytest.raises(grpc.RpcError) as caught:
        answer.result(10)
    assert caught.value.code() is code
    assert forced == []


def test_a_refused_server_stream_begins_anew(fake, channel, client):
    stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
    answers = client.submit(lambda: [each.sequence for each in stub.WatchSession(heartbeat_pb2.WatchSessionRequest())])
    method = HEARTBEATS.methods_by_name["WatchSession"]
    _, _, rpc = fake.take_unary_stream(method)
    rpc.terminate((), UNAUTHENTICATED, "stale")
    metadata, _, rpc = fake.take_unary_stream(method)
    assert bearer(metadata) == ["Bearer second"]
    for sequence in (1, 2):
        rpc.send_response(heartbeat_pb2.WatchSessionResponse(sequence=sequence))
    rpc.terminate((), grpc.StatusCode.OK, "")
    assert answers.result(10) == [1, 2]


def test_a_server_stream_that_has_begun_is_not_begun_anew(fake, channel, client, forced):
    stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
    seen = []

    def watch():
        for each in stub.WatchSession(heartbeat_pb2.WatchSessionRequest()):
            seen.append(each.sequence)

    watching = client.submit(watch)
    _, _, rpc = fake.take_unary_stream(HEARTBEATS.methods_by_name["WatchSession"])
    rpc.send_response(heartbeat_pb2.WatchSessionResponse(sequence=1))
    eventually(lambda: seen)
    rpc.terminate((), UNAUTHENTICATED, "stale")
    with pytest.raises(grpc.RpcError) as caught:
        watching.result(10)
    assert caught.value.code() is UNAUTHENTICATED
    assert (seen, forced) == ([1], [])


def test_a_refused_client_stream_is_sent_again_from_its_beginning_and_pulled_once(fake, channel, client):
    pulled = []
    go_on = threading.Event()

    def requests():
        for each in events("1", "2", "3"):
            pulled.append(each.event.event_id)
            yield each
            if len(pulled) == 2:
                go_on.wait(10)

    answer = client.submit(event_pb2_grpc.EventServiceStub(channel).IngestEvents, requests())
    method = EVENTS.methods_by_name["IngestEvents"]
    _, rpc = fake.take_stream_unary(method)
    assert [rpc.take_request().event.event_id for _ in range(2)] == ["1", "2"]
    rpc.terminate(None, (), UNAUTHENTICATED, "stale")
    metadata, rpc = fake.take_stream_unary(method)
    go_on.set()
    assert bearer(metadata) == ["Bearer second"]
    assert [rpc.take_request().event.event_id for _ in range(3)] == ["1", "2", "3"]
    rpc.requests_closed()
    rpc.terminate(event_pb2.IngestEventsResponse(accepted=3), (), grpc.StatusCode.OK, "")
    assert answer.result(10).accepted == 3
    assert pulled == ["1", "2", "3"]


def test_a_refused_conversation_is_begun_again_without_losing_or_doubling(fake, channel, client):
    stub = event_pb2_grpc.EventServiceStub(channel)

    def requests():
        for each in ("1", "2"):
            yield event_pb2.StreamHookEventsRequest(event=event_pb2.HookEvent(event_id=each))

    answers = client.submit(lambda: [each.event_id for each in stub.StreamHookEvents(requests())])
    method = EVENTS.methods_by_name["StreamHookEvents"]
    _, rpc = fake.take_stream_stream(method)
    assert rpc.take_request().event.event_id == "1"
    rpc.terminate((), UNAUTHENTICATED, "stale")
    _, rpc = fake.take_stream_stream(method)
    for event_id in ("1", "2"):
        assert rpc.take_request().event.event_id == event_id
        rpc.send_response(event_pb2.StreamHookEventsResponse(event_id=event_id))
    rpc.requests_closed()
    rpc.terminate((), grpc.StatusCode.OK, "")
    assert answers.result(10) == ["1", "2"]


def test_the_callers_own_authorization_is_left_alone(fake, channel, client, forced):
    stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
    answer = client.submit(stub.Heartbeat, REQUEST, metadata=(("authorization", "Bearer mine"),))
    metadata, _, rpc = fake.take_unary_unary(HEARTBEATS.methods_by_name["Heartbeat"])
    assert bearer(metadata) == ["Bearer mine"]
    rpc.terminate(None, (), UNAUTHENTICATED, "stale")
    with pytest.raises(grpc.RpcError):
        answer.result(10)
    assert forced == []

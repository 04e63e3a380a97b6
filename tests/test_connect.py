"""What Connect asks of its flavours beyond the rules: headers, proxies, deadlines in headers, other interceptors."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from behaviour_drivers import SlowSource
from conftest import assert_not_blocked, ticking
from connect_drivers import CONNECT_WAYS, asynchronous, converse_requests, event, ingest_requests
from connectrpc.client import ConnectClientSync, ResponseMetadata
from connectrpc.code import Code
from connectrpc.compat import google_protobuf_binary_codec, google_protobuf_json_codec
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.protocol import ProtocolType
from google.protobuf import struct_pb2
from pyqwest import Client, HTTPTransport, HTTPVersion, SyncClient, SyncHTTPTransport

from interceptors import ConnectBearerInterceptor, StaticTokenSource
from interceptors.gen.kontext.agent.v1 import event_connect, event_pb2, heartbeat_connect, heartbeat_pb2

REQUEST = heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=1)
ANSWER = heartbeat_pb2.HeartbeatResponse(sequence=1).SerializeToString()
PROTO = {"Content-Type": "application/proto"}


class Edge:
    """An HTTP/1.1 server that answers as it is told, one request after the other; the last answer again and again.

    None cuts the connection instead.
    """

    def __init__(self, *answers):
        self.requests = []
        edge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                edge.requests.append((dict(self.headers.items()), body, self.path))
                given = answers[min(len(edge.requests), len(answers)) - 1]
                if given is None:
                    self.close_connection = True
                    return
                status, headers, answer = given
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST  # noqa: N815 - its base class's name

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def sent(self, header):
        return [headers.get(header) for headers, _, _ in self.requests]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def refusal(headers=None):
    body = json.dumps({"code": "unauthenticated", "message": "no"}).encode()
    return 401, {"Content-Type": "application/json", **(headers or {})}, body


OK = (200, PROTO, ANSWER)


@pytest.fixture(params=["sync", "async"])
def heartbeat(request):
    """Makes one unary call with a client of its own."""

    def call_sync(url, *interceptors, headers=None, timeout_ms=None, **options):
        with SyncHTTPTransport(http_version=HTTPVersion.HTTP1) as transport:
            options = {"http_client": SyncClient(transport), **options}
            client = heartbeat_connect.HeartbeatServiceClientSync(url, interceptors=interceptors, **options)
            return client.heartbeat(REQUEST, headers=headers, timeout_ms=timeout_ms)

    async def call_async(url, *interceptors, headers=None, timeout_ms=None, **options):
        async with HTTPTransport(http_version=HTTPVersion.HTTP1) as transport:
            options = {"http_client": Client(transport), **options}
            client = heartbeat_connect.HeartbeatServiceClient(url, interceptors=interceptors, **options)
            return await client.heartbeat(REQUEST, headers=headers, timeout_ms=timeout_ms)

    if request.param == "sync":
        return call_sync
    return lambda *arguments, **options: asyncio.run(call_async(*arguments, **options))


# Refusals


def test_a_proxys_plain_401_is_a_refusal_like_any(heartbeat, source, issuer):
    with Edge((401, {"Content-Type": "text/plain"}, b"Jwt is expired"), OK) as edge:
        assert heartbeat(edge.url, ConnectBearerInterceptor(source), send_compression=None).sequence == 1
    first, second = edge.sent("authorization")
    assert first != second
    assert edge.requests[0][1] == edge.requests[1][1] == REQUEST.SerializeToString()
    assert issuer.refreshes == 1


GATEWAYS = [
    {"code": 401, "message": "Jwt is expired"},
    {"code": 16, "message": "Jwt is expired"},
    {"code": "UNAUTHENTICATED", "message": "Jwt is expired", "details": []},
    {"code": "unauthenticated", "message": "Jwt is expired", "details": ["which connectrpc trips over"]},
]


@pytest.mark.parametrize("body", GATEWAYS)
def test_a_gateways_401_in_json_that_is_no_connect_error_is_a_refusal_too(heartbeat, source, issuer, body):
    answer = (401, {"Content-Type": "application/json"}, json.dumps(body).encode())
    with Edge(answer, OK) as edge:
        assert heartbeat(edge.url, ConnectBearerInterceptor(source)).sequence == 1
    assert issuer.refreshes == 1
    with Edge(answer, answer) as edge, pytest.raises(ConnectError) as caught:
        heartbeat(edge.url, ConnectBearerInterceptor(source))
    assert caught.value.code is Code.UNAUTHENTICATED
    assert caught.value.message in {"Jwt is expired", "Unauthorized"}
    assert len(edge.requests) == 2


def test_a_message_is_not_taken_for_a_response(source, issuer):
    listed, scoped = struct_pb2.ListValue(), struct_pb2.Struct()
    listed.extend([1, 2])
    scoped.update({"www-authenticate": 'Bearer error="insufficient_scope"'})
    for message in (listed, scoped):
        answer = (200, PROTO, message.SerializeToString())
        with Edge((401, {"Content-Type": "text/plain"}, b"expired"), answer) as edge:
            client = ConnectClientSync(
                edge.url, codec=google_protobuf_binary_codec(), interceptors=[ConnectBearerInterceptor(source)]
            )
            method = MethodInfo(
                name="M",
                service_name="x.S",
                input=type(message),
                output=type(message),
                idempotency_level=IdempotencyLevel.UNKNOWN,
                stream_type=StreamType.UNARY,
            )
            assert client.execute_unary(request=message, method=method) == message
    assert issuer.refreshes == 2


@pytest.mark.parametrize("end", [(503, {"Content-Type": "text/plain"}, b""), None])
def test_an_end_that_says_nothing_of_the_token_does_not_vouch_for_it(heartbeat, source, issuer, end):
    answers = [answer for _ in range(6) for answer in (refusal(), end)]
    with Edge(*answers) as edge:
        for _ in range(6):
            with pytest.raises(ConnectError):
                heartbeat(edge.url, ConnectBearerInterceptor(source))
    # The cool-down has begun: the issuer is left in peace.
    assert issuer.refreshes < 4


@pytest.mark.parametrize(
    "challenge",
    ['Bearer realm="api", error="insufficient_scope", scope="admin"', "Bearer error=insufficient_scope"],
)
def test_insufficient_scope_is_not_worth_a_refresh(heartbeat, source, issuer, challenge):
    with Edge(refusal({"WWW-Authenticate": challenge})) as edge, pytest.raises(ConnectError) as caught:
        heartbeat(edge.url, ConnectBearerInterceptor(source))
    assert caught.value.code is Code.UNAUTHENTICATED
    assert len(edge.requests) == 1
    assert (issuer.refreshes, source.stats.rejected) == (0, 0)


@pytest.mark.parametrize("said", ["not insufficient_scope", "not error=insufficient_scope, but expired"])
def test_any_other_challenge_is(heartbeat, source, issuer, said):
    challenge = f'Bearer error="invalid_token", error_description="{said}"'
    with Edge(refusal({"WWW-Authenticate": challenge}), OK) as edge:
        heartbeat(edge.url, ConnectBearerInterceptor(source))
    assert issuer.refreshes == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_insufficient_scope_in_the_trailers_of_grpc(source, issuer, kind):
    class Narrow(grpc.GenericRpcHandler):
        def service(self, details):
            def refuse(request, context):
                context.set_trailing_metadata((("www-authenticate", 'Bearer error="insufficient_scope"'),))
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Narrow()])
    url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        given = {"protocol": ProtocolType.GRPC, "interceptors": [ConnectBearerInterceptor(source)]}
        with pytest.raises(ConnectError) as caught:
            if kind == "sync":
                with SyncHTTPTransport(http_version=HTTPVersion.HTTP2) as transport:
                    given["http_client"] = SyncClient(transport)
                    heartbeat_connect.HeartbeatServiceClientSync(url, **given).heartbeat(REQUEST)
            else:

                async def call():
                    async with HTTPTransport(http_version=HTTPVersion.HTTP2) as transport:
                        given["http_client"] = Client(transport)
                        await heartbeat_connect.HeartbeatServiceClient(url, **given).heartbeat(REQUEST)

                asyncio.run(call())
        assert caught.value.code is Code.UNAUTHENTICATED
        assert issuer.refreshes == 0
    finally:
        server.stop(None).wait()


def test_permission_denied_is_never_retried(heartbeat, source, issuer):
    with Edge((403, {"Content-Type": "text/plain"}, b"Forbidden")) as edge, pytest.raises(ConnectError) as caught:
        heartbeat(edge.url, ConnectBearerInterceptor(source))
    assert caught.value.code is Code.PERMISSION_DENIED
    assert (len(edge.requests), issuer.refreshes) == (1, 0)


# What the caller sees


def test_response_metadata_is_the_final_attempts_only(source):
    first = refusal({"X-Attempt": "1", "Trailer-X-End": "1", "X-First": "1"})
    with (
        Edge(first, (200, {**PROTO, "X-Attempt": "2"}, ANSWER)) as edge,
        SyncHTTPTransport(http_version=HTTPVersion.HTTP1) as transport,
    ):
        client = heartbeat_connect.HeartbeatServiceClientSync(
            edge.url, interceptors=[ConnectBearerInterceptor(source)], http_client=SyncClient(transport)
        )
        with ResponseMetadata() as response:
            client.heartbeat(REQUEST)
        assert response.http_status == 200
        assert response.headers.getall("x-attempt") == ["2"]
        assert "x-first" not in response.headers
        assert "x-end" not in response.trailers


def test_the_token_is_gone_from_the_context_when_the_call_is_over(heartbeat):
    seen = []

    class Outer:
        def intercept_unary_sync(self, call_next, request, ctx):
            try:
                return call_next(request, ctx)
            finally:
                seen.append(dict(ctx.request_headers))

        async def intercept_unary(self, call_next, request, ctx):
            try:
                return await call_next(request, ctx)
            finally:
                seen.append(dict(ctx.request_headers))

    source = StaticTokenSource("s3cret")
    with Edge(OK, refusal()) as edge:
        heartbeat(edge.url, Outer(), ConnectBearerInterceptor(source))
        with pytest.raises(ConnectError) as caught:
            heartbeat(edge.url, Outer(), ConnectBearerInterceptor(source))
    assert edge.sent("authorization") == ["Bearer s3cret"] * 2
    assert "s3cret" not in f"{seen} {caught.value!r} {caught.value}"


def test_the_callers_own_authorization_in_any_case_goes_untouched(heartbeat, source, issuer):
    with Edge(refusal()) as edge, pytest.raises(ConnectError):
        heartbeat(edge.url, ConnectBearerInterceptor(source), headers={"AuthoriZation": "Basic eA=="})
    assert edge.sent("authorization") == ["Basic eA=="]
    assert issuer.refreshes == 0


# One deadline


@pytest.mark.parametrize("protocol", [ProtocolType.CONNECT, ProtocolType.GRPC_WEB])
def test_the_second_attempts_header_says_what_is_left(heartbeat, issuer, protocol):
    header = {ProtocolType.CONNECT: "connect-timeout-ms", ProtocolType.GRPC_WEB: "grpc-timeout"}[protocol]
    with (
        Edge((401, {"Content-Type": "text/plain"}, b""), (403, {"Content-Type": "text/plain"}, b"")) as edge,
        SlowSource(issuer) as source,
        ThreadPoolExecutor(1) as pool,
    ):
        source.hold()
        calling = pool.submit(heartbeat, edge.url, ConnectBearerInterceptor(source), timeout_ms=5000, protocol=protocol)
        assert source.waited_for(0.3)
        source.release()
        assert isinstance(calling.exception(20), ConnectError)
    first, second = (int(value.removesuffix("m")) for value in edge.sent(header))
    assert first > 4000
    assert 0 < second <= first - 290


def test_when_nothing_is_left_there_is_no_second_attempt(heartbeat, issuer):
    with Edge(refusal(), OK) as edge, SlowSource(issuer) as source:
        source.hold()
        with pytest.raises(ConnectError) as caught:
            heartbeat(edge.url, ConnectBearerInterceptor(source), timeout_ms=300)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert len(edge.requests) == 1


# Codecs, compression, GET


def test_json_and_get(server, source):
    with SyncHTTPTransport(http_version=HTTPVersion.HTTP1) as transport:
        for codec in (google_protobuf_binary_codec(), google_protobuf_json_codec()):
            client = heartbeat_connect.HeartbeatServiceClientSync(
                server.url,
                codec=codec,
                interceptors=[ConnectBearerInterceptor(source)],
                http_client=SyncClient(transport),
            )
            server.refuse_next()
            session = client.get_session(heartbeat_pb2.GetSessionRequest(session_id="s"), use_get=True)
            assert session.session_id == "s"
            server.refuse_next()
            assert client.heartbeat(REQUEST).sequence == 1


# Streams


def test_a_ping_pong_is_replayed_without_losing_or_doubling(server, source):
    server.refuse_next(after_messages=1)
    turn = threading.Semaphore(1)

    def requests():
        for request in converse_requests("1234"):
            assert turn.acquire(timeout=10)
            yield request

    with SyncHTTPTransport(http_version=HTTPVersion.HTTP2) as transport:
        client = event_connect.EventServiceClientSync(
            server.url, interceptors=[ConnectBearerInterceptor(source)], http_client=SyncClient(transport)
        )
        seen = []
        for response in client.stream_hook_events(requests()):
            seen.append(response.event_id)
            turn.release()
    assert seen == server.event_ids == list("1234")
    assert server.attempts == 2


@pytest.mark.parametrize("way", CONNECT_WAYS)
def test_giving_up_a_response_stream_closes_everything_beneath(server, source, way):
    protocol, version = CONNECT_WAYS[way]
    closed = threading.Event()

    async def requests():
        try:
            yield event_pb2.StreamHookEventsRequest(event=event(1))
            await asyncio.get_running_loop().create_future()
        finally:
            closed.set()

    async def main():
        async with HTTPTransport(http_version=version) as transport:
            given = {
                "protocol": protocol,
                "http_client": Client(transport),
                "interceptors": [ConnectBearerInterceptor(source)],
            }
            watching = heartbeat_connect.HeartbeatServiceClient(server.url, **given).watch_session(
                heartbeat_pb2.WatchSessionRequest(session_id="s")
            )
            assert (await anext(watching)).sequence == 1
            await watching.aclose()
            if version is HTTPVersion.HTTP2:
                talking = event_connect.EventServiceClient(server.url, **given).stream_hook_events(requests())
                assert (await anext(talking)).event_id == "1"
                await talking.aclose()
                assert await asyncio.to_thread(closed.wait, 10)
        gc.collect()
        await nothing_left()

    asyncio.run(main())


async def nothing_left():
    deadline = time.monotonic() + 10
    while asyncio.all_tasks() != {asyncio.current_task()}:
        assert time.monotonic() < deadline, asyncio.all_tasks()
        await asyncio.sleep(0.002)


# asyncio


@pytest.mark.parametrize("phase", ["the first attempt", "the refresh"])
def test_cancelling_leaves_nothing(server, issuer, phase):
    async def main():
        with SlowSource(issuer) as source:
            if phase == "the refresh":
                server.refuse_next(3)
                source.hold()
            else:
                server.hold()
            async with HTTPTransport(http_version=HTTPVersion.HTTP2) as transport:
                given = {"http_client": Client(transport), "interceptors": [ConnectBearerInterceptor(source)]}
                events = event_connect.EventServiceClient(server.url, **given)
                heartbeats = heartbeat_connect.HeartbeatServiceClient(server.url, **given)
                tasks = [
                    asyncio.ensure_future(heartbeats.heartbeat(REQUEST)),
                    asyncio.ensure_future(events.ingest_events(asynchronous(ingest_requests("123")))),
                    asyncio.ensure_future(anext(events.stream_hook_events(asynchronous(converse_requests("123"))))),
                ]
                await asyncio.to_thread(server.wait_for, lambda: server.attempts == 3)
                if phase == "the refresh":
                    assert await asyncio.to_thread(source.waited_for, 0)
                for task in tasks:
                    task.cancel()
                done, _ = await asyncio.wait(tasks, timeout=10)
                assert len(done) == 3
                assert all(task.cancelled() or isinstance(task.exception(), ConnectError) for task in tasks)
                server.release()
                source.release()
                await nothing_left()
        assert server.attempts == 3

    asyncio.run(main())


def test_a_list_is_a_stream_of_requests_as_well(server, source):
    async def main():
        async with HTTPTransport(http_version=HTTPVersion.HTTP2) as transport:
            client = event_connect.EventServiceClient(
                server.url, http_client=Client(transport), interceptors=[ConnectBearerInterceptor(source)]
            )
            return await client.ingest_events(list(ingest_requests("123")))

    assert asyncio.run(main()).event_ids == list("123")


@pytest.mark.parametrize("manner", ["takes its time to end", "does not let itself be cancelled"])
def test_an_iterator_that_is_hard_to_end_does_not_hold_up_the_deadline(server, source, manner):
    released = asyncio.Event()

    async def requests():
        while True:
            try:
                yield event_pb2.IngestEventsRequest(event=event(1))
                await released.wait()
            except asyncio.CancelledError:
                if manner == "takes its time to end":
                    await released.wait()
                    raise

    async def main():
        async with HTTPTransport(http_version=HTTPVersion.HTTP2) as transport:
            client = event_connect.EventServiceClient(
                server.url, http_client=Client(transport), interceptors=[ConnectBearerInterceptor(source)]
            )
            with pytest.raises(ConnectError) as caught:
                await asyncio.wait_for(client.ingest_events(requests(), timeout_ms=300), 10)
            released.set()
            await nothing_left()
        return caught.value.code

    assert asyncio.run(main()) is Code.DEADLINE_EXCEEDED


def test_a_thousand_tasks_cost_one_refresh_that_does_not_block_the_loop(server, issuer, source):
    issuer.hold()
    issuer.revoke(source.token().value)

    async def main():
        async with HTTPTransport(http_version=HTTPVersion.HTTP2) as transport:
            client = heartbeat_connect.HeartbeatServiceClient(
                server.url, http_client=Client(transport), interceptors=[ConnectBearerInterceptor(source)]
            )
            calls = asyncio.gather(*(client.heartbeat(REQUEST) for _ in range(1000)))
            await asyncio.to_thread(issuer.wait_for_token_requests, 1)
            await asyncio.to_thread(server.wait_for, lambda: server.refusals == 1000, 60)
            # All of them wait for the refresh now, and the loop has nothing else to do.
            async with ticking() as gaps:
                await asyncio.sleep(1.0)
            issuer.release()
            await calls
        return gaps

    assert_not_blocked(asyncio.run(main()))
    assert issuer.refreshes == 1
    assert len(server.calls) == 1000


def test_bad_arguments_are_refused_at_once():
    with pytest.raises(TypeError, match="source must be a TokenSource"):
        ConnectBearerInterceptor("token")
    with pytest.raises(ValueError, match="replay_limit must be 0 bytes or more"):
        ConnectBearerInterceptor(StaticTokenSource("t"), replay_limit=-1)

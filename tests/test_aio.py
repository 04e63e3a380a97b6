"""What asyncio asks of grpc.aio beyond the rules: cancellation, both styles of streams, a loop that is not blocked."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import pytest
from abandoned import serving_the_abandoned
from behaviour_drivers import KINDS, SlowSource
from conftest import assert_not_blocked, ticking
from connect_drivers import event
from event_loops import LOOPS

from interceptors import (
    CallableTokenSource,
    StaticTokenSource,
    TokenSource,
    aio_bearer_interceptors,
    authenticated_channel,
    intercept_channel,
)
from interceptors.gen.kontext.agent.v1 import event_pb2, event_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc

IN_TIME = 20


@pytest.fixture(params=LOOPS)
def run(request):
    """Runs a coroutine function and checks that it leaves nothing behind."""

    def run(main):
        complaints = []

        async def checked():
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: complaints.append(context))
            answer = await asyncio.wait_for(main(), IN_TIME)
            gc.collect()
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
            return answer

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            answer = runner.run(checked())
        # gRPC has one completion queue for all loops, and may complain to this one of one that is closed by now.
        assert [each for each in complaints if "PollerCompletionQueue" not in each["message"]] == []
        return answer

    run.loop = request.param
    return run


def skip_what_grpc_cannot(run, way):
    if way == "native" and run.loop == "eager":
        pytest.skip("gRPC's own intercepted calls cannot be written to where tasks are eager")


async def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in time; tasks: {asyncio.all_tasks()}"
        await asyncio.sleep(0.002)


async def happened(condition, server):
    await asyncio.to_thread(server.wait_for, condition)


class Client:
    """Stubs over an intercepted channel, or with native interceptors."""

    def __init__(self, target, source, way="intercept_channel", **options):
        native = aio_bearer_interceptors(source, **options) if way == "native" else None
        self.channel = grpc.aio.insecure_channel(target, interceptors=native)
        if way == "intercept_channel":
            self.channel = intercept_channel(self.channel, source, **options)
        self.heartbeats = heartbeat_pb2_grpc.HeartbeatServiceStub(self.channel)
        self.events = event_pb2_grpc.EventServiceStub(self.channel)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.channel.close()

    def heartbeat(self, sequence=1, **options):
        return self.heartbeats.Heartbeat(heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=sequence), **options)

    def watch(self, count=3, **options):
        return self.heartbeats.WatchSession(
            heartbeat_pb2.WatchSessionRequest(session_id="s", max_messages=count), **options
        )

    def start(self, kind, requests):
        """A call of `kind`, and what waits for its end."""
        if kind == "unary":
            call = self.heartbeat()
        elif kind == "server_stream":
            call = self.watch()
        elif kind == "client_stream":
            call = self.events.IngestEvents(requests.of(event_pb2.IngestEventsRequest))
        else:
            call = self.events.StreamHookEvents(requests.of(event_pb2.StreamHookEventsRequest))
        return call, self._end_of(call, kind)

    async def _end_of(self, call, kind):
        if kind in {"unary", "client_stream"}:
            return await call
        return [response async for response in call]


class EndlessRequests:
    """One request, and then none, for ever."""

    def __init__(self):
        self.open = 0

    async def of(self, kind):
        self.open += 1
        try:
            yield kind(event=event(1))
            await asyncio.get_running_loop().create_future()
        finally:
            self.open -= 1


PHASES = ("waiting for the first token", "the first attempt", "waiting for the refresh", "the second attempt")


@contextlib.asynccontextmanager
async def in_phase(phase, server, issuer, begin):
    """Begins a call and waits until it is in `phase`."""
    with SlowSource(issuer) as source:
        if phase == "waiting for the first token":
            source.reject(source.token())
            source.hold()
        elif phase == "the first attempt":
            server.hold()
        else:
            server.refuse_next()
            source.hold()
        async with Client(server.target, source) as client:
            begun = begin(client)
            if phase != "the first attempt":
                assert await asyncio.to_thread(source.waited_for, 0)
            if phase == "the second attempt":
                server.hold()
                source.release()
                await happened(lambda: server.attempts == 2, server)
            if phase == "the first attempt":
                await happened(lambda: server.attempts == 1, server)
            yield client, begun
            # Whatever was under way is given the chance to go on.
            server.release()
            source.release()
            attempts = server.attempts
            await client.heartbeat()
            assert server.attempts == attempts + 1


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", KINDS)
def test_cancelling_the_task_cancels_whatever_its_call_is_at(run, server, issuer, kind, phase):
    requests = EndlessRequests()

    def begin(client):
        call, end = client.start(kind, requests)
        return call, asyncio.ensure_future(end)

    async def main():
        async with in_phase(phase, server, issuer, begin) as (_, (call, task)):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert call.cancelled()
            assert call.done()
            assert await call.code() is grpc.StatusCode.CANCELLED
            await until(lambda: requests.open == 0)

    run(main)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", KINDS)
def test_cancelling_the_call_cancels_whatever_it_is_at(run, server, issuer, kind, phase):
    requests = EndlessRequests()
    ended = []

    def begin(client):
        call, end = client.start(kind, requests)
        call.add_done_callback(ended.append)
        return call, asyncio.ensure_future(end)

    async def main():
        async with in_phase(phase, server, issuer, begin) as (_, (call, task)):
            assert call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not call.cancel()
            assert call.cancelled()
            assert ended == [call]
            await until(lambda: requests.open == 0)

    run(main)


def test_a_time_limit_around_a_call_ends_it(run, server, issuer):
    async def main():
        with SlowSource(issuer) as source:
            async with Client(server.target, source) as client:
                server.refuse_next()
                source.hold()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.heartbeat(), 0.2)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        async for _ in client.watch():
                            pass
                source.release()
        assert server.attempts == 1

    run(main)


def test_a_failing_task_of_a_group_cancels_the_calls_of_the_others(run, server, issuer, source):
    requests = EndlessRequests()

    async def failing():
        await happened(lambda: server.attempts == len(KINDS), server)
        raise LookupError

    async def main():
        server.hold()
        async with Client(server.target, source) as client:
            with pytest.raises(ExceptionGroup) as caught:
                async with asyncio.TaskGroup() as group:
                    for kind in KINDS:
                        group.create_task(client.start(kind, requests)[1])
                    group.create_task(failing())
            assert caught.group_contains(LookupError)
            await until(lambda: requests.open == 0)
        server.release()

    run(main)


def test_a_refresh_does_not_block_the_loop(run, server, issuer, source):
    issuer.delay = 2.0
    issuer.revoke(source.token().value)

    async def main():
        async with Client(server.target, source) as client, ticking() as gaps:
            began = time.monotonic()
            await client.heartbeat()
            assert time.monotonic() - began >= 2.0
        return gaps

    gc.collect()
    assert_not_blocked(run(main))


def test_a_thousand_tasks_that_meet_a_revoked_token_cost_one_refresh(run, server, issuer, source):
    issuer.revoke(source.token().value)

    async def main():
        async with Client(server.target, source) as client:
            answers = await asyncio.gather(*(client.heartbeat(i) for i in range(1000)))
        assert [answer.sequence for answer in answers] == list(range(1000))

    run(main)
    assert issuer.refreshes == 1
    assert len(server.calls) == 1000


def test_one_source_serves_several_loops_and_threads_at_once(server, issuer, source):
    async def of_a_loop():
        async with Client(server.target, source) as client:
            for _ in range(3):
                await asyncio.gather(*(client.heartbeat(i) for i in range(20)))

    def of_a_thread():
        with authenticated_channel(server.target, source) as channel:
            stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
            for i in range(60):
                stub.Heartbeat(heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=i))

    def of_a_loop_in_a_thread(factory):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(of_a_loop())

    issuer.revoke(source.token().value)
    with ThreadPoolExecutor(6) as pool:
        loops = [pool.submit(of_a_loop_in_a_thread, LOOPS[name]) for name in (*LOOPS, *LOOPS)]
        threads = [pool.submit(of_a_thread) for _ in range(2)]
        for future in (*loops, *threads):
            future.result(IN_TIME)
    assert issuer.refreshes == 1
    assert len(server.calls) == 60 * (len(loops) + len(threads))


# read, write, done_writing


def test_writes_to_a_call_that_was_refused_are_neither_lost_nor_doubled(run, server, source):
    async def main():
        async with Client(server.target, source) as client:
            server.refuse_next(after_messages=1)
            call = client.events.StreamHookEvents()
            for i in range(5):
                await call.write(event_pb2.StreamHookEventsRequest(event=event(i)))
                await happened(lambda: server.refusals == 1, server)
                if i > 1:
                    assert (await call.read()).event_id == str(i - 2)
            await call.done_writing()
            assert [(await call.read()).event_id for _ in range(2)] == ["3", "4"]
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK

    run(main)
    assert server.event_ids == ["0", "1", "2", "3", "4"]
    assert server.attempts == 2


@pytest.mark.parametrize("style", ["read", "iterate"])
def test_responses_that_nobody_has_read_do_not_hinder_a_replay(run, server, source, style):
    async def main():
        async with Client(server.target, source) as client:
            server.refuse_next(after_messages=3)  # it has answered two
            call = client.events.StreamHookEvents()
            written = 0
            while server.attempts < 2:
                await call.write(event_pb2.StreamHookEventsRequest(event=event(written)))
                written += 1
            await call.done_writing()
            if style == "read":
                seen = [(await call.read()).event_id for _ in range(written)]
                assert await call.read() is grpc.aio.EOF
            else:
                seen = [response.event_id async for response in call]
            assert seen == server.event_ids == [str(i) for i in range(written)]

    run(main)
    assert server.attempts == 2


@pytest.mark.parametrize("style", ["read", "iterate"])
def test_responses_that_nobody_has_read_before_the_call_failed_are_not_lost(run, server, source, style):
    async def main():
        async with Client(server.target, source) as client:
            server.refuse_next(after_messages=3, code="PERMISSION_DENIED")
            call = client.events.StreamHookEvents()
            with pytest.raises((grpc.RpcError, asyncio.InvalidStateError)):
                while True:
                    await call.write(event_pb2.StreamHookEventsRequest(event=event(0)))
            seen = []
            with pytest.raises(grpc.RpcError) as caught:
                if style == "read":
                    while True:
                        seen.append(await call.read())
                else:
                    async for response in call:
                        seen.append(response)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert len(seen) == 2
            assert await call.code() is grpc.StatusCode.PERMISSION_DENIED

    run(main)
    assert server.attempts == 1


@pytest.mark.parametrize("written", [0, 1, 3])
def test_a_written_client_stream_is_replayed_with_its_end(run, server, source, written):
    async def main():
        async with Client(server.target, source) as client:
            server.refuse_next(after_messages=written)
            call = client.events.IngestEvents()
            for i in range(written):
                await call.write(event_pb2.IngestEventsRequest(event=event(i)))
            await call.done_writing()
            await call.done_writing()
            with pytest.raises(asyncio.InvalidStateError):
                await call.write(event_pb2.IngestEventsRequest(event=event("late")))
            assert list((await call).event_ids) == [str(i) for i in range(written)]
            assert server.attempts == 2

    run(main)


def test_writing_waits_until_the_message_can_be_sent(run, server, source):
    big = event_pb2.StreamHookEventsRequest(event=event_pb2.HookEvent(event_id="1", tool_input=b"x" * 100_000))

    async def main():
        server.hold()  # nobody reads, so the windows of flow control fill
        async with Client(server.target, source) as client:
            call = client.events.StreamHookEvents()
            written = 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):
                    while written < 1000:
                        await call.write(big)
                        written += 1
            assert written < 1000
            assert call.cancelled()
        server.release()

    run(main)


@pytest.mark.parametrize("way", ["intercept_channel", "native"])
def test_plain_iterators_and_async_ones_are_pulled_once(run, server, source, way):
    pulled = []

    def plain():
        for i in range(4):
            pulled.append(i)
            yield event_pb2.IngestEventsRequest(event=event(i))

    async def asynchronous():
        for request in plain():
            await asyncio.sleep(0)
            yield request

    async def main():
        async with Client(server.target, source, way) as client:
            for requests in (plain(), asynchronous(), list(plain())):
                server.refuse_next(after_messages=2)
                response = await client.events.IngestEvents(requests)
                assert list(response.event_ids) == ["0", "1", "2", "3"]

    run(main)
    assert pulled == [0, 1, 2, 3] * 3


def test_the_two_styles_of_a_stream_are_not_mixed(run, server, source):
    async def main():
        async with Client(server.target, source) as client:
            call = client.watch()
            assert (await call.read()).sequence == 1
            with pytest.raises(grpc.aio.UsageError):
                aiter(call)
            call.cancel()
            call = client.events.StreamHookEvents(iter(()))
            with pytest.raises(grpc.aio.UsageError):
                await call.write(event_pb2.StreamHookEventsRequest())
            with pytest.raises(grpc.aio.UsageError):
                await call.done_writing()
            assert [response async for response in call] == []

    run(main)


# The call object


@pytest.mark.parametrize("way", ["intercept_channel", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_call_tells_of_its_final_attempt_and_calls_back_once(run, server, source, kind, way):
    class Finite:
        async def of(self, kind):
            yield kind(event=event(1))

    ended = []

    async def main():
        async with Client(server.target, source, way) as client:
            server.refuse_next()
            call, end = client.start(kind, Finite())
            call.add_done_callback(ended.append)
            assert await call.initial_metadata() is not None
            await end
            assert await call.code() is grpc.StatusCode.OK
            assert await call.details() == ""
            assert call.done()
            assert not call.cancelled()
            assert not call.cancel()
            await until(lambda: len(ended) == 1)
            call.add_done_callback(ended.append)
            await until(lambda: len(ended) == 2)

    run(main)
    assert server.attempts == 2


def test_the_time_remaining_is_the_callers(run, server, issuer):
    async def main():
        with SlowSource(issuer) as source:
            async with Client(server.target, source) as client:
                call = client.heartbeat()
                assert call.time_remaining() is None
                await call
                server.refuse_next()
                source.hold()
                call = client.heartbeat(timeout=4)
                assert await asyncio.to_thread(source.waited_for, 0.2)
                assert 0 < call.time_remaining() < 3.9
                source.release()
                await call
                assert 0 <= call.time_remaining() < 3.9
                (served,) = [call for call in server.calls if call.time_remaining is not None]
                assert served.time_remaining < 3.9

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_waiting_for_the_connection_waits_for_the_attempt_that_counts(run, server, source, kind):
    requests = EndlessRequests()

    async def main():
        async with Client(server.target, source) as client:
            server.refuse_next()
            call, end = client.start(kind, requests)
            await call.wait_for_connection()
            end = asyncio.ensure_future(end)
            if kind in {"unary", "server_stream"}:
                assert await end
            else:
                end.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await end

    run(main)


def test_a_call_that_nobody_awaits_is_made_again_all_the_same(run, server, source):
    async def main():
        async with Client(server.target, source) as client:
            server.refuse_next()
            call = client.heartbeat()
            await happened(lambda: len(server.calls) == 1, server)
            assert (await call).sequence == 1

    run(main)


@pytest.mark.parametrize("way", ["intercept_channel", "native"])
@pytest.mark.parametrize("kind", ["server_stream", "bidi"])
def test_a_stream_that_nobody_holds_any_more_is_cancelled(run, kind, way):
    skip_what_grpc_cannot(run, way)

    async def main():
        with serving_the_abandoned() as server:
            async with Client(server.target, StaticTokenSource("token"), way) as client:
                if kind == "bidi":
                    call = client.events.StreamHookEvents()
                    await call.write(event_pb2.StreamHookEventsRequest(event=event(1)))
                else:
                    call = client.watch(0)
                assert await call.read()
                assert await asyncio.to_thread(server.begun.wait, 10)
                gone = weakref.ref(call)
                del call
                # As the garbage collector may do it on any thread.
                await asyncio.to_thread(gc.collect)
                if way == "intercept_channel":  # grpc.aio keeps what its interceptors have returned
                    assert gone() is None
                    assert await asyncio.to_thread(server.ended.wait, 10)

    run(main)


@pytest.mark.parametrize("way", ["intercept_channel", "native"])
@pytest.mark.parametrize("kind", ["server_stream", "bidi"])
def test_a_stream_that_is_waited_for_need_not_be_held(run, server, source, kind, way):
    skip_what_grpc_cannot(run, way)
    ended, told = [], []

    async def main():
        async with Client(server.target, source, way) as client:
            server.hold()
            server.refuse_next(4)

            def begin():
                return client.watch(1) if kind == "server_stream" else client.events.StreamHookEvents()

            async def wait():
                ended.append(await begin().code())

            begin().add_done_callback(told.append)
            weakref.WeakSet([asyncio.create_task(wait())])  # the loop holds it no better
            await asyncio.to_thread(server.wait_for, lambda: server.attempts == 2)
            gc.collect()
            server.release()
            await until(lambda: len(ended) == len(told) == 1)

    run(main)
    assert ended == [grpc.StatusCode.UNAUTHENTICATED]
    assert server.attempts == 4


def test_nothing_of_a_call_is_kept_after_its_end(run, server, source):
    async def main():
        async with Client(server.target, source) as client:
            for _ in range(2):  # what is made once is made by the first round
                for kind in KINDS:
                    server.refuse_next()
                    call, end = client.start(kind, _One())
                    await end
                    kept = weakref.ref(call)
                    del call, end
                    gc.collect()
                    await until(lambda kept=kept: kept() is None)

    run(main)


class _One:
    async def of(self, kind):
        yield kind(event=event(1))


def test_closing_the_channel_ends_its_calls_and_leaves_the_source_open(run, server, source):
    async def main():
        server.hold()
        async with Client(server.target, source) as client:
            call = client.heartbeat()
            await happened(lambda: server.attempts == 1, server)
        with pytest.raises(asyncio.CancelledError):
            await call
        server.release()
        async with Client(server.target, source) as client:
            await client.heartbeat()

    run(main)


def test_a_channel_opened_for_asyncio(run, server, source):
    async def main():
        async with authenticated_channel(server.target, source, aio=True) as channel:
            assert isinstance(channel, grpc.aio.Channel)
            await channel.channel_ready()
            assert channel.get_state() is grpc.ChannelConnectivity.READY
            stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
            assert (await stub.Heartbeat(heartbeat_pb2.HeartbeatRequest(sequence=7))).sequence == 7

    run(main)
    with pytest.raises(ValueError, match="plain text"):
        authenticated_channel("api.example.com:443", source, aio=True, credentials=_insecure())


def _insecure():
    from grpc.experimental import insecure_channel_credentials

    return insecure_channel_credentials()


def test_four_native_interceptors_one_for_each_list_of_grpc_aio(run, server):
    interceptors = aio_bearer_interceptors(StaticTokenSource("t"))
    assert [type(each).__mro__[2] for each in interceptors] == [
        grpc.aio.UnaryUnaryClientInterceptor,
        grpc.aio.UnaryStreamClientInterceptor,
        grpc.aio.StreamUnaryClientInterceptor,
        grpc.aio.StreamStreamClientInterceptor,
    ]


# What callers' iterators, sources and interceptors do


@pytest.mark.parametrize("kind", ["client_stream", "bidi"])
@pytest.mark.parametrize("style", ["async", "plain"])
@pytest.mark.parametrize("way", ["intercept_channel", "native"])
@pytest.mark.parametrize("error", [grpc.aio.AioRpcError, asyncio.InvalidStateError, ValueError])
def test_whatever_the_callers_iterator_raises_cancels_the_call(run, server, source, kind, style, way, error):
    empty = grpc.aio.Metadata()
    raised = error(grpc.StatusCode.NOT_FOUND, empty, empty) if error is grpc.aio.AioRpcError else error("no more")
    request = event_pb2.IngestEventsRequest if kind == "client_stream" else event_pb2.StreamHookEventsRequest

    def plain():
        yield request(event=event(1))
        raise raised

    async def asynchronous():
        yield request(event=event(1))
        raise raised

    async def main():
        async with Client(server.target, source, way) as client:
            requests = plain() if style == "plain" else asynchronous()
            if kind == "client_stream":
                await client.events.IngestEvents(requests)
            else:
                async for _ in client.events.StreamHookEvents(requests):
                    pass

    with pytest.raises(asyncio.CancelledError):
        run(main)


class WaitsForTheCall(grpc.aio.StreamUnaryClientInterceptor):
    """As those do that measure calls."""

    async def intercept_stream_unary(self, continuation, client_call_details, request_iterator):
        call = await continuation(client_call_details, request_iterator)
        await call.code()
        return call


class AwaitsTheAnswer(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation, client_call_details, request):
        call = await continuation(client_call_details, request)
        await call
        return call


@pytest.mark.parametrize("refused", [0, 1])
def test_an_interceptor_beneath_may_wait_for_the_call(run, server, source, refused):
    async def main():
        plain = grpc.aio.insecure_channel(server.target, interceptors=[WaitsForTheCall()])
        async with intercept_channel(plain, source) as channel:
            server.refuse_next(refused, after_messages=2 if refused else 0)
            events = event_pb2_grpc.EventServiceStub(channel)
            requests = (event_pb2.IngestEventsRequest(event=event(number)) for number in "123")
            return list((await events.IngestEvents(requests)).event_ids)

    assert run(main) == list("123")


class FailsUnary(grpc.aio.UnaryUnaryClientInterceptor):
    """With what is no gRPC error."""

    async def intercept_unary_unary(self, continuation, client_call_details, request):
        raise LookupError


class FailsServerStreams(grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation, client_call_details, request):
        raise LookupError


@pytest.mark.parametrize("kind", ["unary", "server_stream"])
@pytest.mark.parametrize("asks", ["done", "cancelled", "cancel", "add_done_callback"])
def test_a_call_whose_interceptor_beneath_has_failed_raises_that_to_its_reader_only(run, server, kind, asks):
    async def main():
        # gRPC's own task may complain that nobody has asked how it failed.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        plain = grpc.aio.insecure_channel(server.target, interceptors=[FailsUnary(), FailsServerStreams()])
        async with intercept_channel(plain, CallableTokenSource(lambda _: "t")) as channel:
            stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
            call = (
                stub.Heartbeat(heartbeat_pb2.HeartbeatRequest())
                if kind == "unary"
                else stub.WatchSession(heartbeat_pb2.WatchSessionRequest())
            )
            with pytest.raises(LookupError):
                await (call if kind == "unary" else anext(aiter(call)))
            # In this moment the call has not been called back.
            told = []
            answer = call.add_done_callback(told.append) if asks == "add_done_callback" else getattr(call, asks)()
            with pytest.raises(LookupError):
                await call.code()
            return answer, told == [call], call.done()

    assert run(main) == (
        {"done": True, "cancelled": False, "cancel": False, "add_done_callback": None}[asks],
        asks == "add_done_callback",
        True,
    )


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_native_interceptors_retry_although_one_nearer_to_the_wire_awaits_the_answer(run, server, source, refused):
    async def main():
        native = aio_bearer_interceptors(source)
        async with grpc.aio.insecure_channel(
            server.target, interceptors=[native[0], AwaitsTheAnswer(), *native[1:]]
        ) as channel:
            server.refuse_next(refused)
            stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
            return (await stub.Heartbeat(heartbeat_pb2.HeartbeatRequest(sequence=1))).sequence

    if refused < 2:
        assert run(main) == 1
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            run(main)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert source.stats.rejected == refused
    assert server.attempts == 1 + min(refused, 1)


@pytest.mark.parametrize("way", ["intercept_channel", "native"])
@pytest.mark.parametrize("refused", [0, 1])
def test_reading_and_writing_works_however_tokens_are_attached(run, server, source, way, refused):
    skip_what_grpc_cannot(run, way)

    async def main():
        async with Client(server.target, source, way) as client:
            server.refuse_next(refused)
            talk = client.events.StreamHookEvents()
            for number in "123":
                await talk.write(event_pb2.StreamHookEventsRequest(event=event(number)))
                assert (await talk.read()).event_id == number
            await talk.done_writing()
            assert await talk.read() is grpc.aio.EOF
            server.refuse_next(refused)
            upload = client.events.IngestEvents()
            for number in "456":
                await upload.write(event_pb2.IngestEventsRequest(event=event(number)))
            await upload.done_writing()
            assert list((await upload).event_ids) == list("456")

    run(main)
    assert server.event_ids == list("123456")


@pytest.mark.parametrize("way", ["intercept_channel", "native"])
def test_metadata_may_be_an_iterator(run, server, source, way):
    async def main():
        async with Client(server.target, source, way) as client:
            await client.heartbeat(metadata=iter([("x-a", "1"), ("x-b", "2")]))
            with pytest.raises(grpc.aio.AioRpcError):
                await client.heartbeat(metadata=iter([("authorization", "Basic eA=="), ("x-c", "3")]))

    run(main)
    assert [pair for pair in server.calls[0].metadata if pair[0].startswith("x-")] == [("x-a", "1"), ("x-b", "2")]
    assert (len(server.calls), source.stats.rejected) == (1, 0)


class Cancelled(TokenSource):
    """Has waited for something that was cancelled."""

    def token(self, *, timeout=None):
        raise concurrent.futures.CancelledError

    async def token_async(self, *, timeout=None):  # noqa: ASYNC109 - its contract
        task = asyncio.ensure_future(asyncio.sleep(60))
        task.cancel()
        await task


@pytest.mark.parametrize("way", ["intercept_channel", "native"])
@pytest.mark.parametrize("base", ["of a thread", "of a task"])
def test_something_cancelled_within_the_source_ends_the_call_with_an_error(run, server, way, base):
    class OfAThread(Cancelled):
        token_async = TokenSource.token_async

    async def main():
        async with Client(server.target, OfAThread() if base == "of a thread" else Cancelled(), way) as client:
            await client.heartbeat(timeout=10)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        run(main)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("phase", ["waiting for the first token", "waiting for the refresh"])
def test_a_call_whose_tasks_are_all_cancelled_ends(run, server, issuer, phase):
    async def main():
        async with in_phase(phase, server, issuer, lambda client: client.heartbeat()) as (_, call):
            for task in asyncio.all_tasks():
                if "AuthenticatedCall" in repr(task.get_coro()):
                    task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert call.cancelled()

    run(main)


def test_a_time_limit_around_a_write_does_not_end_a_stream_that_has_no_token_yet(run, server, issuer):
    async def main():
        with SlowSource(issuer) as source:
            source.reject(source.token())
            source.hold()
            async with Client(server.target, source) as client:
                call = client.events.StreamHookEvents()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(call.write(event_pb2.StreamHookEventsRequest(event=event(1))), 0.05)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(call.wait_for_connection(), 0.05)
                assert not call.cancelled()
                source.release()
                assert (await call.read()).event_id == "1"
                await call.done_writing()

    run(main)


@pytest.mark.parametrize("phase", ["waiting for the first token", "waiting for the refresh"])
@pytest.mark.parametrize("grace", [None, 0.05, 20])
def test_closing_the_channel_gives_calls_that_wait_for_a_token_their_grace(run, server, issuer, phase, grace):
    async def main():
        with SlowSource(issuer) as source:
            source.hold()
            if phase == "waiting for the refresh":
                server.refuse_next()
            else:
                source.reject(source.peek())
            client = Client(server.target, source)
            call = client.heartbeat()
            assert await asyncio.to_thread(source.waited_for, 0)
            closing = asyncio.ensure_future(client.channel.close(grace))
            if grace == 20:
                await asyncio.sleep(0)
                assert not call.done()
                source.release()
                assert (await call).sequence == 1
            else:
                with pytest.raises(asyncio.CancelledError):
                    await call
            await closing

    run(main)

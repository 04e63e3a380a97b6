"""Rules 5 and 6: request streams are replayed whole, in order, and pulled once, whoever dies when."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import queue
import threading
import weakref
from collections import deque

import pytest
from conftest import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted import PATIENCE, in_background

from interceptors.messages import size_of
from interceptors.replay import AsyncReplayableRequests, ReplayableRequests, RequestLog


def as_it_is(message):
    return message


def replayable(iterator, limit=1000):
    return ReplayableRequests(iterator, as_it_is, len, limit)


def async_replayable(iterator, limit=1000):
    return AsyncReplayableRequests(iterator, as_it_is, len, limit)


# The log


class LogModel(RuleBasedStateMachine):
    """The log beside a plain list of all messages."""

    @initialize(limit=st.integers(0, 60))
    def start(self, limit):
        self.limit = limit
        self.log = RequestLog(limit)
        self.all = []
        self.sent = 0
        self.whole = True  # a second attempt must be possible

    @rule(size=st.integers(0, 20))
    def pull(self, size):
        message = (len(self.all), size)
        self.all.append(message)
        if self.whole and sum(size or 1 for _, size in self.all) > self.limit:
            self.whole = False
        self.log.append(message, size)

    @precondition(lambda self: self.sent < len(self.all))
    @rule()
    def send(self):
        assert self.log.next() == self.all[self.sent]
        self.sent += 1

    @rule()
    def free(self):
        self.log.free()
        self.whole = False

    @rule()
    def rewind(self):
        assert self.log.rewind() == self.whole
        if self.whole:
            self.sent = 0
            self.whole = False

    @invariant()
    def it_agrees(self):
        if hasattr(self, "log"):
            assert self.log.ahead == (self.sent < len(self.all))
            assert self.log.replayable == self.whole
            kept = len(self.log._messages)
            assert kept == (len(self.all) if self.whole else len(self.all) - self.sent)


TestLog = LogModel.TestCase


def test_exactly_the_limit_can_still_be_replayed_and_one_byte_more_cannot():
    log = RequestLog(10)
    for _ in range(2):
        log.append(b"12345", 5)
        log.next()
    assert log.replayable
    log.append(b"1", 1)
    assert not log.replayable
    assert not log.rewind()
    assert log.next() == b"1"


def test_an_endless_stream_of_empty_messages_is_not_kept_for_ever():
    log = RequestLog(100)
    for _ in range(101):
        log.append(b"", 0)
        log.next()
    assert not log.replayable
    assert not log._messages


@pytest.mark.parametrize(("message", "size"), [(b"abc", 3), (bytearray(2), 2), (memoryview(b"a"), 1), (object(), 0)])
def test_the_size_of_a_message_is_its_serialised_size(message, size):
    assert size_of(message) == size


def test_the_size_of_a_protobuf_message_is_its_byte_size():
    from google.protobuf.wrappers_pb2 import StringValue

    assert size_of(StringValue(value="abc")) == StringValue(value="abc").ByteSize()


# Threads


def test_a_second_attempt_sends_what_the_first_has_sent_and_goes_on_from_there():
    requests = replayable(iter([b"a", b"b", b"c", b"d"]))
    first = requests.attempt()
    assert [next(first), next(first)] == [b"a", b"b"]
    assert requests.rewind()
    assert list(requests.attempt()) == [b"a", b"b", b"c", b"d"]
    assert list(first) == []


def test_a_stream_that_was_sent_whole_is_replayed_whole():
    requests = replayable(iter([b"a", b"b"]))
    assert list(requests.attempt()) == [b"a", b"b"]
    assert requests.rewind()
    assert list(requests.attempt()) == [b"a", b"b"]


def test_there_is_no_third_attempt():
    requests = replayable(iter([b"a"]))
    list(requests.attempt())
    assert requests.rewind()
    assert not requests.rewind()


def test_past_the_limit_a_stream_goes_on_and_cannot_be_replayed():
    requests = replayable(iter([b"12345", b"678", b"9", b"0"]), limit=8)
    attempt = requests.attempt()
    assert [next(attempt), next(attempt), next(attempt)] == [b"12345", b"678", b"9"]
    assert not requests.rewind()
    assert list(attempt) == []  # the call is over


def test_once_committed_a_stream_goes_on_and_cannot_be_replayed():
    requests = replayable(iter([b"a", b"b", b"c"]))
    attempt = requests.attempt()
    assert next(attempt) == b"a"
    requests.free()
    assert not requests._kept
    assert list(attempt) == [b"b", b"c"]
    assert not requests.rewind()


class Waiting:
    """A caller's iterator that yields what the test puts, and says when somebody waits in it, and whether two do."""

    def __init__(self):
        self.messages = queue.Queue()
        self.entered = threading.Semaphore(0)
        self.inside = 0
        self.most_inside = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.entered.release()
        try:
            message = self.messages.get(timeout=PATIENCE)
        finally:
            self.inside -= 1
        if isinstance(message, BaseException):
            raise message
        return message


def test_a_message_that_the_first_attempt_was_waiting_for_when_it_died_goes_to_the_second():
    caller = Waiting()
    requests = replayable(caller)
    first = requests.attempt()
    caller.messages.put(b"a")
    assert next(first) == b"a"
    assert caller.entered.acquire(timeout=PATIENCE)
    stuck = in_background(lambda: list(first))
    assert caller.entered.acquire(timeout=PATIENCE)
    assert requests.rewind()
    second = requests.attempt()
    assert next(second) == b"a"
    waiting = in_background(lambda: [next(second), next(second)])
    caller.messages.put(b"b")
    caller.messages.put(b"c")
    assert waiting() == [b"b", b"c"]
    assert stuck() == []
    assert caller.most_inside == 1


@pytest.mark.parametrize("ending", [StopIteration(), ValueError("odd")], ids=repr)
def test_so_does_the_end_of_the_stream_and_an_error(ending):
    caller = Waiting()
    requests = replayable(caller)
    stuck = in_background(lambda: list(requests.attempt()))
    assert caller.entered.acquire(timeout=PATIENCE)
    requests.rewind()
    waiting = in_background(lambda: list(requests.attempt()))
    caller.messages.put(ending)
    if isinstance(ending, StopIteration):
        assert stuck() == waiting() == []
    else:
        with pytest.raises(ValueError, match="odd"):
            waiting()


def test_what_the_callers_iterator_or_the_serialiser_raises_is_raised_in_each_attempt_at_its_place():
    def fussy(message):
        if message == b"bad":
            raise TypeError("cannot be serialised")
        return message

    requests = ReplayableRequests(iter([b"a", b"bad", b"c"]), fussy, len, 1000)
    for _ in range(2):
        attempt = requests.attempt()
        assert next(attempt) == b"a"
        with pytest.raises(TypeError, match="cannot be serialised"):
            next(attempt)
        requests.rewind()


def test_after_stop_nothing_is_pulled():
    caller = Waiting()
    requests = replayable(caller)
    attempt = requests.attempt()
    caller.messages.put(b"a")
    next(attempt)
    requests.stop()
    caller.messages.put(b"b")
    assert list(attempt) == []
    assert not requests.rewind()
    assert list(requests.attempt()) == []
    assert caller.messages.qsize() == 1


def test_stop_does_not_wait_for_the_callers_iterator():
    caller = Waiting()
    requests = replayable(caller)
    stuck = in_background(lambda: list(requests.attempt()))
    assert caller.entered.acquire(timeout=PATIENCE)
    requests.stop()
    requests.free()
    caller.messages.put(b"late")
    assert stuck() == []
    assert caller.entered.acquire(blocking=False) is False


def test_what_is_kept_is_what_was_prepared_so_changing_a_message_later_changes_nothing():
    shared = bytearray(b"a")

    def caller():
        for letter in b"abc":
            shared[:] = bytes([letter])
            yield shared

    requests = ReplayableRequests(caller(), bytes, len, 1000)
    assert list(requests.attempt()) == [b"a", b"b", b"c"]
    requests.rewind()
    assert list(requests.attempt()) == [b"a", b"b", b"c"]


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(0, 30),
    die_after=st.integers(0, 30),
    limit=st.sampled_from([5, 20, 10_000]),
    commit_after=st.one_of(st.none(), st.integers(0, 30)),
)
def test_whenever_the_first_attempt_dies_its_thread_may_go_on_and_nothing_is_lost_doubled_or_pulled_twice(
    count, die_after, limit, commit_after
):
    pulled = []

    def caller():
        for number in range(count):
            pulled.append(number)
            yield b"%02d" % number

    everything = [b"%02d" % number for number in range(count)]
    requests = replayable(caller(), limit)
    sent_first, sent = [], []
    reached = threading.Event()

    def first_attempt():
        for message in requests.attempt():
            sent_first.append(message)
            if commit_after is not None and len(sent_first) == commit_after:
                requests.free()
            if len(sent_first) == die_after:
                reached.set()
        reached.set()

    running = in_background(first_attempt)
    assert reached.wait(PATIENCE)
    again = requests.rewind()  # the first attempt's thread is anywhere by now
    if again:
        sent = list(requests.attempt())
    running()
    assert sent_first == everything[: len(sent_first)]
    assert pulled == sorted(set(pulled))
    if again:
        assert sent == everything
        assert pulled == list(range(count))


def test_many_races_of_a_dying_attempt_with_the_next_one():
    for round_ in range(200):
        go = threading.Event()

        def caller(go=go):
            for number in range(20):
                if number == 10:
                    go.set()
                yield b"%02d" % number

        requests = replayable(caller())
        first = in_background(lambda requests=requests: deque(requests.attempt(), maxlen=0))
        if round_ % 2:
            go.wait(PATIENCE)
        assert requests.rewind()
        assert list(requests.attempt()) == [b"%02d" % number for number in range(20)]
        first()


# Event loops


async def letters(text):
    for letter in text:
        await asyncio.sleep(0)
        yield letter.encode()


async def collected(attempt):
    return [message async for message in attempt]


def run(main):
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


def test_async_a_second_attempt_sends_what_the_first_has_sent_and_goes_on_from_there():
    async def main():
        requests = async_replayable(letters("abcd"))
        first = requests.attempt()
        assert [await anext(first), await anext(first)] == [b"a", b"b"]
        assert requests.rewind()
        assert await collected(requests.attempt()) == [b"a", b"b", b"c", b"d"]
        assert await collected(first) == []
        assert not requests.rewind()

    run(main())


def test_async_past_the_limit_and_once_committed_a_stream_goes_on_and_cannot_be_replayed():
    async def main():
        requests = async_replayable(letters("abcd"), limit=2)
        attempt = requests.attempt()
        assert [await anext(attempt) for _ in range(3)] == [b"a", b"b", b"c"]
        assert not requests._log.replayable
        assert await collected(attempt) == [b"d"]
        assert not requests.rewind()

        requests = async_replayable(letters("abcd"))
        attempt = requests.attempt()
        await anext(attempt)
        requests.free()
        assert not requests._log._messages
        assert await collected(attempt) == [b"b", b"c", b"d"]
        assert not requests.rewind()

    run(main())


class AsyncWaiting:
    """A caller's async iterator that yields what the test puts, and says whether somebody waits in it."""

    def __init__(self):
        self.messages = asyncio.Queue()
        self.inside = 0
        self.most_inside = 0
        self.cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            message = await self.messages.get()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.inside -= 1
        if isinstance(message, BaseException):
            raise message
        return message


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0)


@pytest.mark.parametrize("cancel", [False, True])
def test_async_a_message_that_the_first_attempt_was_waiting_for_when_it_died_goes_to_the_second(cancel):
    async def main():
        caller = AsyncWaiting()
        requests = async_replayable(caller)
        first = asyncio.ensure_future(collected(requests.attempt()))
        await until(lambda: caller.inside)
        if cancel:
            first.cancel()
            await asyncio.wait([first])
        assert requests.rewind()
        second = requests.attempt()
        waiting = asyncio.ensure_future(anext(second))
        await asyncio.sleep(0)
        caller.messages.put_nowait(b"a")
        assert await waiting == b"a"
        assert caller.most_inside == 1
        assert not caller.cancelled
        if not cancel:
            assert await first == []
        await requests.stop()

    run(main())


def test_async_a_generator_survives_the_cancellation_of_an_attempt_that_waits_in_it():
    async def main():
        gate = asyncio.Event()

        async def caller():
            yield b"a"
            await gate.wait()
            yield b"b"

        requests = async_replayable(caller())
        first = asyncio.ensure_future(collected(requests.attempt()))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        gate.set()
        assert requests.rewind()
        assert await collected(requests.attempt()) == [b"a", b"b"]

    run(main())


def test_async_an_attempt_that_is_replaced_ends_at_once_although_the_caller_has_nothing_to_send():
    async def main():
        caller = AsyncWaiting()
        requests = async_replayable(caller)
        first = asyncio.ensure_future(collected(requests.attempt()))
        await until(lambda: caller.inside)
        requests.rewind()
        assert await first == []
        await requests.stop()
        assert caller.cancelled

    run(main())


@pytest.mark.parametrize("ending", [StopAsyncIteration(), ValueError("odd"), asyncio.CancelledError()], ids=repr)
def test_async_the_end_of_the_stream_and_errors_reach_each_attempt(ending):
    async def main():
        caller = AsyncWaiting()
        requests = async_replayable(caller)
        caller.messages.put_nowait(b"a")
        caller.messages.put_nowait(ending)
        for _ in range(2):
            attempt = requests.attempt()
            assert await anext(attempt) == b"a"
            with pytest.raises(type(ending)):
                await anext(attempt)
            requests.rewind()
        assert caller.messages.empty()

    run(main())


def test_async_what_the_serialiser_raises_is_raised_where_the_message_would_have_been_sent():
    async def main():
        requests = AsyncReplayableRequests(letters("ab"), lambda message: message.upper() / 2, len, 1000)
        for _ in range(2):
            with pytest.raises(TypeError):
                await anext(requests.attempt())
            requests.rewind()

    run(main())


def test_async_stop_ends_the_pulling_that_is_under_way_and_nothing_is_pulled_afterwards():
    async def main():
        caller = AsyncWaiting()
        requests = async_replayable(caller)
        attempt = requests.attempt()
        waiting = asyncio.ensure_future(collected(attempt))
        await until(lambda: caller.inside)
        await requests.stop()
        assert caller.cancelled
        assert await waiting == []
        caller.messages.put_nowait(b"late")
        assert await collected(attempt) == await collected(requests.attempt()) == []
        assert not requests.rewind()
        assert caller.messages.qsize() == 1
        await requests.stop()

    run(main())


def test_async_a_caller_may_end_its_call_from_its_own_iterator():
    async def main():
        async def caller():
            yield b"a"
            await requests.stop()
            yield b"b"

        requests = async_replayable(caller())
        assert await collected(requests.attempt()) == [b"a"]

    run(main())


def test_async_messages_are_pulled_when_they_are_wanted_and_not_ahead():
    async def main():
        pulled = []

        async def caller():
            for number in range(5):
                pulled.append(number)
                yield b"%d" % number

        requests = async_replayable(caller())
        attempt = requests.attempt()
        for number in range(3):
            await anext(attempt)
            for _ in range(5):
                await asyncio.sleep(0)
            assert pulled == list(range(number + 1))
        await requests.stop()

    run(main())


def test_async_a_generator_runs_in_one_task_and_one_context_as_without_us():
    variable = contextvars.ContextVar("variable", default="outside")

    async def main():
        seen = set()

        async def caller():
            token = variable.set("inside")
            async with asyncio.timeout(PATIENCE):
                for _ in range(3):
                    seen.add((variable.get(), asyncio.current_task()))
                    yield b"a"
            variable.reset(token)

        requests = async_replayable(caller())
        first = requests.attempt()
        await anext(first)
        requests.rewind()
        assert await collected(requests.attempt()) == [b"a"] * 3
        assert len(seen) == 1
        assert variable.get() == "outside"

    run(main())


def test_async_a_call_that_is_given_up_without_an_end_leaves_nothing_behind(caplog):
    async def main():
        finished = []

        async def caller():
            try:
                while True:
                    yield b"a"
            finally:
                finished.append(True)

        requests = async_replayable(caller())
        attempt = requests.attempt()
        await anext(attempt)
        task, gone = requests._pulling._task, weakref.ref(requests)
        del requests, attempt
        gc.collect()
        assert gone() is None
        await asyncio.wait([task], timeout=PATIENCE)
        del task
        gc.collect()
        await until(lambda: finished)

    run(main())
    assert caplog.text == ""


def test_async_so_it_is_when_its_loop_has_ended(caplog):
    async def main():
        requests = async_replayable(letters("ab"))
        await anext(requests.attempt())
        return requests

    requests = run(main())
    gone = weakref.ref(requests)
    del requests
    eventually(lambda: gc.collect() is not None and gone() is None)
    assert caplog.text == ""


class AsyncModel(RuleBasedStateMachine):
    """Pulls, deaths, cancellations, commits, in any order: what is sent is what the caller has, in order."""

    @initialize(limit=st.sampled_from([3, 1000]))
    def start(self, limit):
        self.runner = asyncio.Runner()
        self.runner.__enter__()
        self.put = 0
        self.attempts = 0
        self.over = False
        self.tasks = []

        async def begin():
            self.caller = AsyncWaiting()
            self.requests = async_replayable(self.caller, limit)

        self.runner.run(begin())
        self.begin_attempt()

    def begin_attempt(self):
        self.attempts += 1
        self.sent = sent = []
        attempt = self.requests.attempt()

        async def send():
            async for message in attempt:
                sent.append(message)

        async def begin():
            self.tasks.append(asyncio.ensure_future(send()))

        self.runner.run(begin())

    async def rest(self):
        for _ in range(6):
            await asyncio.sleep(0)

    @rule()
    def the_loop_runs(self):
        self.runner.run(self.rest())

    @rule()
    def the_caller_sends(self):
        async def put():
            self.caller.messages.put_nowait(b"%d" % (self.put % 10))

        self.runner.run(put())
        self.put += 1

    @rule(cancel=st.booleans())
    def the_attempt_is_refused(self, cancel):
        async def refuse():
            if cancel:
                self.tasks[-1].cancel()
                await self.rest()
            return self.requests.rewind()

        if self.over:
            return
        if self.runner.run(refuse()):
            self.begin_attempt()
        else:
            self.end()

    @rule()
    def the_first_response_comes(self):
        self.requests.free()

    def end(self):
        self.over = True
        self.runner.run(self.requests.stop())

    @rule()
    def the_call_ends(self):
        self.end()

    @invariant()
    def what_was_sent_is_in_order(self):
        if hasattr(self, "sent"):
            assert self.sent == [b"%d" % (number % 10) for number in range(len(self.sent))]
            assert self.caller.most_inside <= 1
            assert self.attempts <= 2

    def teardown(self):
        if not hasattr(self, "runner"):
            return
        if not self.over and not self.tasks[-1].done():
            # whatever happened: the present attempt gets all that the caller has sent
            async def last():
                for _ in range(4 * self.put + 10):
                    await asyncio.sleep(0)

            self.runner.run(last())
            assert len(self.sent) == self.put
        for task in self.tasks:
            task.cancel()
        self.runner.run(self.requests.stop())
        self.runner.close()


AsyncModel.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAsync = AsyncModel.TestCase

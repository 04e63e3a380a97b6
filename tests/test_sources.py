"""Sources that do not refresh by themselves, and what every source can do for event loops."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from conftest import FakeClock, eventually
from scripted import PATIENCE, SECRET, World, in_background, in_threads, value, values

from interceptors import (
    CallableTokenSource,
    LoginRequired,
    RefreshError,
    StaticTokenSource,
    Token,
    TokenSource,
)

# Static


@pytest.mark.parametrize("given", ["abc", Token("abc"), Token("abc", 5.0)])
def test_a_static_source_hands_out_its_token_for_ever(given):
    source = StaticTokenSource(given)
    assert source.token().value == source.peek().value == source.token(timeout=0).value == "abc"
    source.reject(source.token())
    source.accept(source.token())
    assert source.peek() is source.token() is asyncio.run(source.token_async())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("", ValueError, "b64token"),
        ("Bearer abc", ValueError, "without 'Bearer'"),
        ("abc\r\nx-admin: 1", ValueError, "b64token"),
        (b"abc", TypeError, "must be a str, not bytes"),
        (None, TypeError, "must be a str, not NoneType"),
    ],
)
def test_what_is_no_token_is_refused_at_once_and_not_shown(given, error, message):
    with pytest.raises(error, match=message) as caught:
        StaticTokenSource(given)
    assert "abc" not in str(caught.value)


def test_a_static_source_shows_no_token():
    assert SECRET not in repr(StaticTokenSource(SECRET))


# Callable


class Application:
    """A token function as applications have them: it caches, and gets another token when forced."""

    def __init__(self, *, stubborn=False):
        self.asked = []
        self.forced = 0
        self.stubborn = stubborn  # without force it goes on returning the first token
        self.inside = 0
        self.most_inside = 0

    def __call__(self, force_refresh):
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.asked.append(force_refresh)
        self.forced += force_refresh
        self.inside -= 1
        return f"t{0 if self.stubborn and not force_refresh else self.forced}"


@pytest.fixture
def monotonic(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr("interceptors.source.time", SimpleNamespace(monotonic=clock))
    return clock


def test_the_function_is_asked_for_every_call_and_forced_after_a_refusal_only():
    application = Application()
    source = CallableTokenSource(application)
    assert source.peek() is None
    for _ in range(3):
        assert source.token().value == "t0"
    source.reject(source.token())
    assert source.token().value == "t1"
    assert application.asked == [False] * 5 + [True]
    assert source.token().value == "t1"
    assert application.forced == 1


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_two_hundred_threads_that_are_refused_with_one_token_force_once(stubborn, timeout):
    application = Application(stubborn=stubborn)
    source = CallableTokenSource(application)
    refused = source.token()

    def call(_):
        source.reject(refused)
        return source.token(timeout=timeout)

    assert values(in_threads(200, call)) == {"t1"}
    assert application.forced == 1
    assert application.most_inside == 1


def test_a_function_that_goes_on_returning_what_was_refused_is_not_believed():
    source = CallableTokenSource(Application(stubborn=True))
    source.reject(source.token())
    for _ in range(5):
        assert source.token().value == "t1"
    source.accept(source.token())
    source.reject(source.token())
    assert source.token().value == "t2"


def test_a_late_rejection_of_a_replaced_token_changes_nothing():
    application = Application()
    source = CallableTokenSource(application)
    old = source.token()
    source.reject(old)
    source.token()
    for _ in range(100):
        source.reject(old)
        assert source.token().value == "t1"
    assert application.forced == 1


def test_a_forced_token_that_is_refused_as_well_begins_a_cool_down(monotonic):
    application = Application()
    source = CallableTokenSource(application)
    for _ in range(1000):
        source.reject(source.token())
    assert application.forced == 1
    assert source.token().value == "t1"  # the server has the last word
    monotonic.advance(1.01)
    assert source.token().value == "t2"
    source.accept(source.token())
    source.reject(source.token())
    assert source.token().value == "t3"


@pytest.mark.parametrize("every", [0.1, 5.0, 30.0])
def test_a_server_that_refuses_everything_for_an_hour_forces_few_refreshes(monotonic, every):
    application = Application()
    source = CallableTokenSource(application)
    end = monotonic() + 3600
    while monotonic() < end:
        source.reject(source.token())
        source.reject(source.token())
        monotonic.advance(every)
    assert application.forced <= 22


def test_a_forced_token_that_was_in_use_for_long_is_replaced_at_once(monotonic):
    source = CallableTokenSource(Application())
    source.reject(source.token())
    assert source.token().value == "t1"
    monotonic.advance(600)
    source.reject(source.token())
    assert source.token().value == "t2"


def test_a_function_that_insists_on_its_token_is_not_forced_again_once_the_server_takes_it(monotonic):
    asked = []

    def fn(force_refresh):
        asked.append(force_refresh)
        return "the-only-one"

    source = CallableTokenSource(fn)
    source.reject(source.token())
    assert source.token().value == "the-only-one"
    for _ in range(100):  # the server has changed its mind
        assert source.token().value == "the-only-one"
        monotonic.advance(10)
    assert asked.count(True) == 1
    for _ in range(100):  # and again
        source.reject(source.token())
    assert asked.count(True) <= 2


def test_what_was_refused_is_forgotten_when_the_function_has_moved_on():
    source = CallableTokenSource(Application())
    for _ in range(100):
        source.reject(source.token())
        source.accept(source.token())
        source.token()
    assert len(source._refused) <= 1


@pytest.mark.parametrize("timeout", [None, PATIENCE])
@pytest.mark.parametrize(
    "raised", [ValueError("odd"), StopIteration(), TimeoutError("slow"), KeyError("odd")], ids=repr
)
def test_what_the_function_raises_is_a_refresh_error_with_that_as_its_cause(raised, timeout):
    def fn(_):
        raise raised

    with pytest.raises(RefreshError, match=f"token function failed with {type(raised).__name__}") as caught:
        CallableTokenSource(fn).token(timeout=timeout)
    assert caught.value.__cause__ is raised
    assert "odd" not in str(caught.value)


def test_but_not_what_shows_a_token_that_was_handed_out():
    tokens = [SECRET * 2]

    def fn(_):
        if tokens:
            return tokens.pop()
        raise ValueError("expired: " + SECRET * 2)

    source = CallableTokenSource(fn)
    source.token()
    with pytest.raises(RefreshError, match="token function failed with ValueError") as caught:
        source.token()
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_an_auth_error_from_the_function_is_passed_on():
    def fn(_):
        raise LoginRequired("log in")

    for timeout in (None, PATIENCE):
        with pytest.raises(LoginRequired, match="log in"):
            CallableTokenSource(fn).token(timeout=timeout)


@pytest.mark.parametrize("returned", [None, b"abc", "", "Bearer s3cr3t", "s3cr3t\n", 5], ids=repr)
def test_what_is_no_token_is_a_refresh_error_that_shows_nothing(returned):
    with pytest.raises(RefreshError, match="returned no token") as caught:
        CallableTokenSource(lambda _: returned).token()
    error = caught.value
    while error is not None:
        assert SECRET not in f"{error!s} {error!r}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("fn", [None, "token", 5])
def test_what_cannot_be_called_is_refused_at_once(fn):
    with pytest.raises(TypeError, match="fn must be a callable"):
        CallableTokenSource(fn)


@pytest.mark.parametrize("fn", [lambda: "abc", lambda *, force_refresh: "abc", lambda a, b: "abc"])
def test_a_function_that_cannot_be_called_so_is_refused_at_once(fn):
    with pytest.raises(TypeError, match=r"fn\(force_refresh: bool\) -> str"):
        CallableTokenSource(fn)


@pytest.mark.parametrize("fn", [lambda force_refresh: "abc", lambda force=False: "abc", lambda *given: "abc"])
def test_a_function_that_can_be_called_so_will_do(fn):
    assert CallableTokenSource(fn).token().value == "abc"


def test_a_slow_function_keeps_nobody_longer_than_its_time_and_serves_later_callers():
    gate = threading.Event()

    def fn(_):
        assert gate.wait(PATIENCE)
        return "abc"

    source = CallableTokenSource(fn)
    patient = in_background(lambda: source.token(timeout=PATIENCE))
    for timeout in (0, 0.02, -1):
        with pytest.raises(TimeoutError):
            source.token(timeout=timeout)
    gate.set()
    assert patient().value == source.token(timeout=PATIENCE).value == source.token(timeout=float("inf")).value == "abc"


def test_those_who_have_given_up_are_not_asked_for():
    gate = threading.Event()
    asked = []

    def fn(_):
        asked.append(1)
        assert gate.wait(PATIENCE)
        return "abc"

    source = CallableTokenSource(fn)
    for _ in range(50):
        with pytest.raises(TimeoutError):
            source.token(timeout=0.002)
    gate.set()
    source.token(timeout=PATIENCE)
    assert len(asked) <= 3


@pytest.mark.parametrize(
    "use",
    [
        lambda source: source.token(),
        lambda source: source.token(timeout=PATIENCE),
        lambda source: asyncio.run(source.token_async()),
    ],
    ids=["token", "with a timeout", "on an event loop"],
)
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_a_function_that_uses_its_own_source_is_an_error_and_no_deadlock(use, timeout):
    nested = [use]

    def fn(_):
        return nested.pop()(source) if nested else "abc"

    source = CallableTokenSource(fn)
    with pytest.raises(RefreshError, match="must not use its source"):
        in_background(lambda: source.token(timeout=timeout))()
    assert in_background(lambda: source.token(timeout=timeout))().value == "abc"


def test_a_callable_source_shows_its_function_and_no_token():
    source = CallableTokenSource(Application())
    source.token()
    assert repr(source) == "CallableTokenSource(Application)"
    assert "t0" not in repr(source)


def test_rejecting_never_blocks_while_the_function_is_slow():
    gate = threading.Event()
    source = CallableTokenSource(lambda _: gate.wait(PATIENCE) and "abc")
    waiting = in_background(source.token)
    source.reject(Token("x"))
    source.accept(Token("x"))
    gate.set()
    assert waiting().value == "abc"


# Event loops


@dataclass
class Slow(TokenSource):
    """A source of somebody else's, which knows nothing of `TokenSource.__init__` and cannot be hashed."""

    gate: threading.Event

    def __post_init__(self):
        self.threads = []

    def token(self, *, timeout=None):
        self.threads.append(threading.current_thread())
        assert self.gate.wait(PATIENCE)
        return Token("slow")


@pytest.fixture
def gate():
    gate = threading.Event()
    yield gate
    gate.set()


def test_a_thousand_tasks_wait_for_one_thread_and_the_default_executor_stays_free(gate):
    source = Slow(gate)

    async def main():
        loop = asyncio.get_running_loop()
        before = threading.active_count()
        tasks = [asyncio.ensure_future(source.token_async(timeout=PATIENCE)) for _ in range(1000)]
        await asyncio.sleep(0.05)
        assert threading.active_count() <= before + 1
        assert loop._default_executor is None
        ticks = 0
        for _ in range(10):  # the loop goes on
            await asyncio.sleep(0)
            ticks += 1
        gate.set()
        return {token.value for token in await asyncio.gather(*tasks)}

    assert asyncio.run(main()) == {"slow"}
    assert len(source.threads) <= 3
    assert threading.main_thread() not in source.threads


def test_several_loops_in_several_threads_share_one_source():
    with World() as world:
        source = world.source()

        async def main():
            return await asyncio.gather(*(source.token_async(timeout=PATIENCE) for _ in range(50)))

        tokens = in_threads(8, lambda _: asyncio.run(main()))
        assert values([token for one in tokens for token in one]) == {value(0)}
        world.clock.advance(7200)
        tokens = in_threads(8, lambda _: asyncio.run(main()))
        assert values([token for one in tokens for token in one]) == {value(1)}
        assert len(world.issuer.asked) == 1


def test_threads_and_loops_share_one_source_and_one_refresh():
    with World() as world:
        source = world.warm_source()
        source.reject(source.token())

        def ask(i):
            return asyncio.run(source.token_async(timeout=PATIENCE)) if i % 2 else source.token(timeout=PATIENCE)

        assert values(in_threads(40, ask)) == {value(1)}
        assert len(world.issuer.asked) == 1


def test_a_fresh_token_costs_a_task_no_switch():
    with World() as world:
        source = world.warm_source()
        coroutine = source.token_async()
        with pytest.raises(StopIteration) as stop:
            coroutine.send(None)
        assert stop.value.value.value == value(0)
        assert "_token_waiter" not in source.__dict__


def test_a_task_waits_no_longer_than_its_time(gate):
    async def main():
        source = Slow(gate)
        begin = time.monotonic()
        for timeout in (0, 0.02, -1):
            with pytest.raises(TimeoutError):
                await source.token_async(timeout=timeout)
        assert time.monotonic() - begin < PATIENCE / 2
        gate.set()
        assert (await source.token_async(timeout=PATIENCE)).value == "slow"

    asyncio.run(main())


def test_a_cancelled_task_leaves_the_others_waiting(gate):
    async def main():
        source = Slow(gate)
        tasks = [asyncio.ensure_future(source.token_async()) for _ in range(10)]
        await asyncio.sleep(0.01)
        for task in tasks[:5]:
            task.cancel()
        await asyncio.sleep(0)
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 5 + [Token] * 5

    asyncio.run(main())


def test_a_loop_that_ended_before_its_answer_came_harms_nobody(gate, caplog):
    source = Slow(gate)

    async def give_up():
        await asyncio.wait_for(source.token_async(), 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    loop = asyncio.new_event_loop()
    task = loop.create_task(source.token_async())
    loop.run_until_complete(asyncio.sleep(0.01))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    gate.set()
    assert asyncio.run(source.token_async(timeout=PATIENCE)).value == "slow"
    assert caplog.text == ""


class UncopyableError(Exception):
    def __init__(self, *, why):
        super().__init__(why, "more")


@pytest.mark.parametrize(
    "raised",
    [LoginRequired("log in"), RefreshError("down", retry_after=3.0), ValueError("odd"), UncopyableError(why="odd")],
    ids=lambda raised: type(raised).__name__,
)
def test_each_task_gets_the_sources_error(raised):
    class Failing(TokenSource):
        def token(self, *, timeout=None):
            raise raised

    async def main():
        source = Failing()
        for _ in range(2):
            errors = await asyncio.gather(
                *(source.token_async(timeout=PATIENCE) for _ in range(20)), return_exceptions=True
            )
            assert {type(error) for error in errors} == {type(raised)}
            assert {str(error) for error in errors} == {str(raised)}
            assert {getattr(error, "retry_after", None) for error in errors} == {getattr(raised, "retry_after", None)}

    asyncio.run(main())


def test_a_source_that_runs_out_of_tokens_hangs_no_task():
    class Iterating(TokenSource):
        tokens = iter([Token("first")])

        def token(self, *, timeout=None):
            return next(self.tokens)

    async def main():
        source = Iterating()
        assert (await source.token_async(timeout=PATIENCE)).value == "first"
        with pytest.raises(RuntimeError, match="StopIteration"):
            await source.token_async(timeout=PATIENCE)

    asyncio.run(main())


@pytest.mark.parametrize("odd", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_whatever_a_source_raises_the_next_who_asks_is_served(odd):
    class Odd(TokenSource):
        script = [odd, Token("next")]  # noqa: RUF012

        def token(self, *, timeout=None):
            answer = self.script.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer

    source = Odd()
    from interceptors.waiting import waiter_of

    assert isinstance(waiter_of(source).request().exception(PATIENCE), type(odd))
    assert asyncio.run(source.token_async(timeout=PATIENCE)).value == "next"


def test_a_callable_source_serves_loops():
    application = Application()
    source = CallableTokenSource(application)

    async def main():
        first = await source.token_async(timeout=PATIENCE)
        source.reject(first)
        return await asyncio.gather(*(source.token_async(timeout=PATIENCE) for _ in range(100)))

    assert values(asyncio.run(main())) == {"t1"}
    assert application.forced == 1


def test_uvloop_is_served_as_well():
    uvloop = pytest.importorskip("uvloop")
    with World() as world:
        source = world.source()

        async def main():
            return await asyncio.gather(*(source.token_async(timeout=PATIENCE) for _ in range(50)))

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert values(runner.run(main())) == {value(0)}


def test_a_source_that_nobody_waits_for_any_more_is_collected():
    source = CallableTokenSource(lambda _: "abc")
    source.token(timeout=PATIENCE)
    gone = weakref.ref(source)
    del source

    def collected():
        gc.collect()
        return gone() is None

    eventually(collected)


def test_a_source_must_say_how_to_get_a_token():
    with pytest.raises(TypeError, match="abstract"):
        TokenSource()


def test_by_default_a_source_cannot_say_without_waiting_and_ignores_what_servers_say(gate):
    source = Slow(gate)
    assert source.peek() is None
    assert source.reject(Token("a")) is None
    assert source.accept(Token("a")) is None

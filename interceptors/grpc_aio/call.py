"""The call objects: one call to its user, one or two attempts beneath. The twin of `grpc_sync.call`.

An attempt's end is noticed through its callback, so that a call which nobody awaits is made again as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from grpc.aio import AioRpcError

from interceptors.call import Call, Failure, Send, Surface
from interceptors.grpc_aio.requests import STYLE_ERROR

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence

    from interceptors.grpc_aio.requests import IteratedRequests, RequestStream
    from interceptors.source import TokenSource
    from interceptors.tokens import Token

_log = logging.getLogger("interceptors")

_CANCELLED_DETAILS: Final = "Locally cancelled by application!"
_CLOSED_DETAILS: Final = "Channel is closed."
_TRAILERS_ONLY_SECONDS: Final = 0.05
_PROVISIONAL_SECONDS: Final = tuple(0.001 * 2**step for step in range(10))
_PROVISIONAL_DETAILS: Final = "Internal error from Core"


def local_error(failure: Failure) -> AioRpcError:
    """The error that a caller gets for `failure`."""
    empty = grpc.aio.Metadata()
    error = AioRpcError(grpc.StatusCode[failure.code], empty, empty, failure.details, failure.details)
    error.__cause__ = failure.cause
    return error


class AuthenticatedCall:
    """What the four kinds of call have in common.

    Args:
        source: Where tokens come from.
        start: Starts an attempt with a token, in so many seconds (None: no limit); may be a coroutine function.
        deadline: When the caller's time is up; see `interceptors.call.Call`.
        requests: The request stream, if the call has one.
        waiting: Where the call is noted while it waits for a token.
        dealings: The call's dealings with its source, if there were any before the first attempt.
    """

    # Most calls end well with their first attempt and need none of these of their own.
    _dealings: Call | None = None
    _ended: Any = None  # the attempt whose end has been dealt with
    _pending: asyncio.Task[None] | None = None
    _settling: asyncio.Task[None] | None = None
    _error: AioRpcError | None = None  # how the call ended, if no attempt says so
    _status: AioRpcError | None = None  # how the latest attempt ended, if it may say something else later
    _cause: BaseException | None = None
    _committed = False
    _over = False
    _cancelled = False
    _callbacks: Sequence[Callable[[Any], None]] = ()
    _waiting: Sequence[asyncio.Future[None]] = ()
    _attempt: Any = None  # the latest
    _token: Token | None = None  # what it carries

    def __init__(
        self,
        source: TokenSource,
        start: Callable[[Token, float | None], Any],
        deadline: float | None,
        requests: RequestStream | IteratedRequests | None = None,
        waiting: WaitingCalls | None = None,
        dealings: Call | None = None,
    ) -> None:
        self._source = source
        self._start = start
        self._deadline = deadline
        self._requests = requests
        self._waiting_calls = waiting
        if dealings is not None:
            self._dealings = dealings

    @property
    def _call(self) -> Call:
        """The call's dealings with its source."""
        if self._dealings is None:
            self._dealings = Call(self._source, self._deadline)
        return self._dealings

    def begin(self, token: Token | None, timeout: float | None) -> None:
        """Makes the first attempt with `token`, or as soon as the source has one."""
        if token is None:
            self._ask(self._call.begin)
        else:
            self.adopt(token, self._start(token, timeout))

    def adopt(self, token: Token, attempt: Any) -> None:
        """Takes `attempt`, which carries `token`, as the present one."""
        self._token = token
        self._attempt = attempt
        self._watch(attempt)
        if self._requests is not None:
            self._requests.attempt_began()

    # Attempts, one after the other

    def _watch(self, attempt: Any) -> None:
        attempt.add_done_callback(_Ending(self))

    def attempt_ended(self, attempt: Any) -> bool:
        """Deals with the end of `attempt`, of which it may be told more than once; True if it has been."""
        try:
            if self._requests is None and self._dealings is None and _is_ok(attempt):
                self._ended = attempt
                self._over = True
                if self._waiting or self._callbacks:
                    self._finish()
            else:
                self._settle(attempt)
        except Exception as error:  # noqa: BLE001 - a source that breaks its contract must not leave the caller waiting
            self._end(None, error)
        return self._ended is attempt

    def _settle(self, attempt: Any) -> None:
        """Decides, once, what the end of `attempt` means."""
        if self._over or attempt is self._ended or attempt is not self._attempt:
            return
        if _is_ok(attempt):
            self._settle_as(attempt, grpc.StatusCode.OK)
            return
        code = _now(attempt.code())
        if code is None or (self._requests is not None and _is_provisional(attempt, code)):
            if self._settling is None:
                self._settling = asyncio.ensure_future(self._settle_later(attempt))
            return
        self._settle_as(attempt, code)

    def _settle_as(self, attempt: Any, code: grpc.StatusCode) -> None:
        self._settling = None
        self._ended = attempt
        if code is grpc.StatusCode.OK:
            self._status = None
            if self._dealings is not None:
                self._dealings.passed()
            self._finish()
            return
        if self._requests is not None:
            self._status = _status_now(attempt)
        if code is not grpc.StatusCode.UNAUTHENTICATED:
            self._call.ended(code.name)
        else:
            assert self._token is not None
            replayable = (
                not self._committed and not self._cancelled and (self._requests is None or self._requests.rewind())
            )
            if self._call.refused(self._token, replayable=replayable):
                self._ask(self._call.again)
                return
        self._finish()

    async def _settle_later(self, attempt: Any) -> None:
        code = await attempt.code()
        # Most attempts call back once more when the server's status replaces a provisional one, but not those of
        # interceptors beneath.
        for delay in _PROVISIONAL_SECONDS:
            if self._ended is attempt:
                return
            if not _is_provisional(attempt, code):
                break
            await asyncio.sleep(delay)
            code = await attempt.code()
        if self._ended is not attempt and not self._over:
            self._settle_as(attempt, code)

    def _ask(self, decide: Callable[[Token | BaseException], Send | Failure | Surface]) -> None:
        token = self._source.peek()
        if token is not None and not inspect.iscoroutinefunction(self._start):
            self._go_on(decide(token))
        else:
            if self._waiting_calls is not None:
                self._waiting_calls.add(self)
            self._pending = asyncio.ensure_future(self._wait_for_token(decide))

    async def _wait_for_token(self, decide: Callable[[Token | BaseException], Send | Failure | Surface]) -> None:
        try:
            await self._wait_and_go_on(decide)
        except asyncio.CancelledError:
            # By somebody who cancels whatever task there is.
            self._end_as_cancelled(_CANCELLED_DETAILS)
            raise
        finally:
            if self._waiting_calls is not None:
                self._waiting_calls.discard(self)

    async def _wait_and_go_on(self, decide: Callable[[Token | BaseException], Send | Failure | Surface]) -> None:
        decision = decide(await self._call.ask_async())
        if isinstance(decision, Send) and inspect.iscoroutinefunction(self._start):
            try:
                attempt = await self._start(decision.token, decision.timeout)
            except Exception as error:  # noqa: BLE001 - as in _go_on
                self._could_not_start(error)
                return
            self._began(decision.token, attempt)
        else:
            self._go_on(decision)

    def _go_on(self, decision: Send | Failure | Surface) -> None:
        if self._over:
            return
        if isinstance(decision, Send):
            try:
                attempt = self._start(decision.token, decision.timeout)
            except Exception as error:  # noqa: BLE001 - a closed channel, for example; nobody is there to raise it to
                self._could_not_start(error)
                return
            self._began(decision.token, attempt)
        elif isinstance(decision, Failure):
            self._end(local_error(decision), decision.cause)
        else:
            self._end(None, decision.cause)

    def _began(self, token: Token, attempt: Any) -> None:
        if self._over:
            attempt.cancel()
            return
        self._pending = None
        self.adopt(token, attempt)
        self._wake()

    def _could_not_start(self, error: BaseException) -> None:
        empty = grpc.aio.Metadata()
        details = f"the call could not be started: {type(error).__name__}"
        closed = AioRpcError(grpc.StatusCode.CANCELLED, empty, empty, details, details)
        self._end(None if self._attempt is not None else closed, error)

    def _end(self, error: AioRpcError | None, cause: BaseException | None) -> None:
        """Ends the call without a further attempt: with `error`, or as the latest attempt ended."""
        if not self._over:
            self._error = error
            self._cause = cause
            self._finish()

    def _finish(self) -> None:
        self._over = True
        if self._requests is not None:
            self._requests.stop()
        if self._waiting:
            self._wake()
        if not self._callbacks:
            return
        callbacks, self._callbacks = self._callbacks, ()
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # noqa: BLE001 - no call may hang because of a user's callback
                _log.exception("Exception in callback %r", callback)

    def _end_as_cancelled(self, details: str) -> None:
        empty = grpc.aio.Metadata()
        self._cancelled = True
        self._end(AioRpcError(grpc.StatusCode.CANCELLED, empty, empty, details, details), None)

    def _commit(self, attempt: Any) -> bool:
        """The caller receives the first response of `attempt`; False if another attempt has taken its place."""
        if attempt is not self._attempt or (attempt is self._ended and not self._over):
            return False
        self._committed = True
        if self._requests is not None:
            self._requests.free()
        if self._dealings is not None:
            self._dealings.passed()
        return True

    # Waiting

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, ()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _next_change(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting = (*self._waiting, future)
        return future

    async def _following(self, attempt: Any) -> Any:
        """The attempt that follows `attempt` once it has begun; `attempt` if none will."""
        if attempt is not None:
            self._settle(attempt)
        while not self._over and self._attempt is attempt:
            await self._next_change()
        if self._error is not None:
            self._raise_local()
        return self._attempt

    def _raise_local(self) -> None:
        if self._cancelled:
            raise asyncio.CancelledError
        assert self._error is not None
        raise self._error

    def final_error(self, error: AioRpcError) -> AioRpcError:
        """How the final attempt failed, which has raised `error`."""
        final = error if self._status is None or self._status.code() is error.code() else self._status
        final.__cause__ = self._cause
        return final

    async def _final(self) -> Any:
        """What tells how the call ended, once it is over: an error, or the final attempt."""
        self._notice()
        while not self._over:
            await self._next_change()
        return self._error or self._status or self._attempt

    def _notice(self) -> None:
        attempt = self._attempt
        if attempt is not None and not self._over and attempt is not self._ended and attempt.done():
            self._settle(attempt)

    # grpc.aio.Call

    async def initial_metadata(self) -> Any:
        """See `grpc.aio.Call.initial_metadata`."""
        attempt = self._attempt
        while True:
            if attempt is None:
                while self._attempt is None and not self._over:
                    await self._next_change()
                attempt = self._attempt
                if attempt is None:
                    return await _said(await self._final(), "initial_metadata")
            metadata = await attempt.initial_metadata()
            if not metadata and not self._committed and not self._over and self._ended is not attempt:
                # As in the sync twin: of an answer that is all trailers, this may come a moment before the status.
                await asyncio.wait([self._next_change()], timeout=_TRAILERS_ONLY_SECONDS)
            self._notice()
            if self._over:
                return await _said(await self._final(), "initial_metadata")
            if attempt is not self._ended:
                return metadata
            while self._attempt is attempt and not self._over:
                await self._next_change()
            attempt = self._attempt

    async def trailing_metadata(self) -> Any:
        """See `grpc.aio.Call.trailing_metadata`."""
        return await _said(await self._final(), "trailing_metadata")

    async def code(self) -> Any:
        """See `grpc.aio.Call.code`."""
        return await _said(await self._final(), "code")

    async def details(self) -> Any:
        """See `grpc.aio.Call.details`."""
        return await _said(await self._final(), "details")

    async def debug_error_string(self) -> Any:
        """What gRPC's core says of an error, beyond its details."""
        return await _said(await self._final(), "debug_error_string")

    async def wait_for_connection(self) -> None:
        """See `grpc.aio.Call.wait_for_connection`."""
        attempt = self._attempt if self._attempt is not None else await self._following(None)
        while True:
            try:
                await attempt.wait_for_connection()
            except AioRpcError as error:
                following = await self._following(attempt)
                if following is attempt:
                    raise self.final_error(error) from self._cause
                attempt = following
            else:
                return

    def time_remaining(self) -> Any:
        """See `grpc.aio.RpcContext.time_remaining`."""
        attempt = self._attempt
        return self._call.remaining() if attempt is None or attempt is self._ended else attempt.time_remaining()

    def cancelled(self) -> bool:
        """See `grpc.aio.RpcContext.cancelled`."""
        error = self._error or (self._status if self._over else None)
        if error is not None:
            return error.code() is grpc.StatusCode.CANCELLED
        if self._attempt is None or (self._attempt is self._ended and not self._over):
            return self._cancelled
        return bool(self._attempt.cancelled())

    def done(self) -> bool:
        """See `grpc.aio.RpcContext.done`."""
        self._notice()
        return self._over

    def cancel(self) -> bool:
        """See `grpc.aio.RpcContext.cancel`: ends the attempt in flight, a pending retry, the pulling of requests."""
        self._notice()
        if self._over:
            return False
        self._cancelled = True
        attempt = None if self._attempt is self._ended else self._attempt
        if attempt is not None:
            cancelled = bool(attempt.cancel())
            if self._requests is not None:
                self._requests.stop()
            self._notice()
            return cancelled
        self._stop_waiting(_CANCELLED_DETAILS)
        return True

    def channel_closed(self) -> None:
        """Ends the call, which waits for a token that nothing can be sent with any more."""
        if not self._over:
            self._stop_waiting(_CLOSED_DETAILS)

    def _stop_waiting(self, details: str) -> None:
        if self._pending is not None:
            self._pending.cancel()
        self._end_as_cancelled(details)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """See `grpc.aio.RpcContext.add_done_callback`."""
        self._notice()
        if self._over:
            callback(self)
        else:
            self._callbacks = (*self._callbacks, callback)

    def __repr__(self) -> str:
        attempt = self._attempt
        error = self._error or (self._status if self._over else None)
        if error is not None:
            return repr(error).replace("AioRpcError", type(self).__name__)
        return f"<{type(self).__name__} object>" if attempt is None else repr(attempt)

    __str__ = __repr__


class _UnaryResponse(AuthenticatedCall):
    def __await__(self) -> Generator[Any, None, Any]:
        try:
            attempt = self._attempt
            if attempt is None:
                attempt = yield from self._following(None).__await__()
            while True:
                try:
                    return (yield from attempt.__await__())
                except AioRpcError as error:
                    following = yield from self._following(attempt).__await__()
                    if following is attempt:
                        raise self.final_error(error) from self._cause
                    attempt = following
        except asyncio.CancelledError:
            # Whoever awaits a call and is cancelled cancels the call, as with a plain one.
            self.cancel()
            raise


class _StreamResponse(AuthenticatedCall):
    _iterator: AsyncIterator[Any] | None = None
    _style: str | None = None
    _reading = False
    _unread: deque[Any] | None = None  # what was read ahead of the caller; see `_settle_later`
    _loop: asyncio.AbstractEventLoop

    # A stream that nobody holds any more is cancelled, as gRPC means to do it: so its attempt knows it weakly only. But
    # whoever waits for it, or wants to be called back, need not hold it.

    def _watch(self, attempt: Any) -> None:
        self._loop = asyncio.get_running_loop()
        attempt.add_done_callback(functools.partial(_attempt_of_stream_ended, weakref.ref(self)))

    def _next_change(self) -> asyncio.Future[None]:
        _pinned.add(self)
        return super()._next_change()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        super().add_done_callback(callback)
        if self._callbacks:
            _pinned.add(self)

    def _wake(self) -> None:
        super()._wake()
        if not self._callbacks:
            _pinned.discard(self)

    def _finish(self) -> None:
        super()._finish()
        _pinned.discard(self)

    def __del__(self) -> None:
        if not self._over and self._attempt is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_give_up, self._attempt, self._requests)

    def _use(self, style: str) -> None:
        if self._style not in {None, style}:
            raise grpc.aio.UsageError(STYLE_ERROR)
        self._style = style

    def __aiter__(self) -> AsyncIterator[Any]:
        self._use("iterator")
        if self._iterator is None:
            self._iterator = self._responses()
        return self._iterator

    async def _responses(self) -> AsyncIterator[Any]:
        while (response := await self._next(_iterated)) is not grpc.aio.EOF:
            yield response
            if self._unread is None:
                break
        else:
            return
        # From the first response on, nothing but the final attempt's end can matter.
        attempt = self._attempt
        try:
            async for response in attempt:
                yield response
        except AioRpcError as error:
            await self._following(attempt)
            raise self.final_error(error) from self._cause
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def read(self) -> Any:
        """See `grpc.aio.UnaryStreamCall.read`."""
        if not (self._over and self._attempt is not None):
            self._use("reader")
        return await self._next(_read)

    async def _next(self, read: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """The next response, or EOF."""
        try:
            return await self._next_of_whichever(read)
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def _next_of_whichever(self, read: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        attempt = self._attempt if self._attempt is not None else await self._following(None)
        while True:
            if self._unread is not None:
                attempt = await self._following(attempt)
                if self._unread is not None:
                    return self._next_unread()
            if self._error is not None:
                self._raise_local()
            try:
                self._reading = True
                response = await read(attempt)
            except AioRpcError as error:
                following = await self._following(attempt)
                if following is attempt:
                    raise self.final_error(error) from self._cause
                attempt = following
            else:
                if response is grpc.aio.EOF or self._committed or self._commit(attempt):
                    return response
                attempt = await self._following(attempt)
            finally:
                self._reading = False

    def _next_unread(self) -> Any:
        assert self._unread is not None
        if self._unread:
            return self._unread.popleft()
        if self._status is not None:
            raise self._status from self._cause
        return grpc.aio.EOF

    async def _settle_later(self, attempt: Any) -> None:
        if not self._committed and not self._reading:
            # The server's status comes after its responses, and nobody reads them. They are the caller's if the
            # attempt was the final one.
            self._unread = deque()
            responses = attempt.__aiter__()
            try:
                async for response in responses:
                    self._unread.append(response)
            except AioRpcError:
                pass  # the status is there
            except asyncio.CancelledError:
                if not self._over:
                    raise
        await super()._settle_later(attempt)

    def adopt(self, token: Token, attempt: Any) -> None:
        self._unread = None
        super().adopt(token, attempt)


class _StreamRequest(AuthenticatedCall):
    _requests: RequestStream | IteratedRequests

    async def write(self, request: Any) -> None:
        """See `grpc.aio.StreamUnaryCall.write`."""
        await self._requests.write(request)

    async def done_writing(self) -> None:
        """See `grpc.aio.StreamUnaryCall.done_writing`."""
        await self._requests.done_writing()

    @property
    def _done_writing_flag(self) -> bool:
        # What gRPC's own intercepted calls ask of the call beneath them before they write.
        return self._requests.half_closed


class UnaryUnaryCall(_UnaryResponse, grpc.aio.UnaryUnaryCall):
    """A unary call that is made once more with another token if its first attempt is refused."""


class UnaryStreamCall(_StreamResponse, grpc.aio.UnaryStreamCall):
    """A server stream that is made once more with another token if its first attempt is refused."""


class StreamUnaryCall(_StreamRequest, _UnaryResponse, grpc.aio.StreamUnaryCall):
    """A client stream that is made once more with another token if its first attempt is refused."""


class StreamStreamCall(_StreamRequest, _StreamResponse, grpc.aio.StreamStreamCall):
    """A bidirectional stream that is made once more with another token if its first attempt is refused."""


async def _said(teller: Any, what: str) -> Any:
    """What an error, or an attempt that is over, says of itself."""
    said = getattr(teller, what)()
    return said if isinstance(teller, AioRpcError) else await said


async def _iterated(attempt: Any) -> Any:
    return await anext(attempt.__aiter__(), grpc.aio.EOF)


async def _read(attempt: Any) -> Any:
    return await attempt.read()


def _now(answer: Coroutine[Any, Any, Any]) -> Any:
    """What `answer` returns if it need not wait; else None."""
    try:
        answer.send(None)
    except StopIteration as returned:
        return returned.value
    answer.close()
    return None


def _is_provisional(attempt: Any, code: grpc.StatusCode) -> bool:
    """Whether `code` is not the server's.

    When a write fails because the server has ended the call, grpc.aio says INTERNAL: before it has read the server's
    status, which then replaces it, or afterwards.
    """
    return code is grpc.StatusCode.INTERNAL and _now(attempt.details()) == _PROVISIONAL_DETAILS


def _status_now(attempt: Any) -> AioRpcError | None:
    """How `attempt`, which is over, has failed; kept because grpc.aio may put something else in its place."""
    code = _now(attempt.code())
    if code is None:
        return None
    return AioRpcError(
        code,
        _now(attempt.initial_metadata()),
        _now(attempt.trailing_metadata()),
        _now(attempt.details()),
        _now(attempt.debug_error_string()),
    )


class _Ending:
    """Tells a call that an attempt is over, and then forgets the call: or they would keep each other alive."""

    __slots__ = ("_call",)

    def __init__(self, call: AuthenticatedCall) -> None:
        self._call: AuthenticatedCall | None = call

    def __call__(self, attempt: Any) -> None:
        call = self._call
        if call is not None and call.attempt_ended(attempt):
            self._call = None


class WaitingCalls:
    """The calls of a channel that wait for a token: gRPC, which has none of them at that time, cannot end them."""

    def __init__(self) -> None:
        self._calls: set[AuthenticatedCall] = set()

    def add(self, call: AuthenticatedCall) -> None:
        """Notes a call."""
        self._calls.add(call)

    def discard(self, call: AuthenticatedCall) -> None:
        """Forgets a call."""
        self._calls.discard(call)

    async def channel_closes(self, grace: float | None) -> float | None:
        """Waits for them to go on for at most `grace` seconds, ends the others, and returns what is left of it."""
        if not self._calls:
            return grace
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (grace or 0.0)
        pending = {call._pending for call in self._calls if call._pending is not None}  # noqa: SLF001
        if grace and pending:
            await asyncio.wait(pending, timeout=grace)
        for call in list(self._calls):
            call.channel_closed()
        return None if grace is None else max(deadline - loop.time(), 0.0)


# Streams that somebody waits for and nobody need hold.
_pinned: set[AuthenticatedCall] = set()


def _give_up(attempt: Any, requests: RequestStream | IteratedRequests | None) -> None:
    attempt.cancel()
    if requests is not None:
        requests.stop()


def _attempt_of_stream_ended(call_of: weakref.ref[AuthenticatedCall], attempt: Any) -> None:
    call = call_of()
    if call is not None:
        call.attempt_ended(attempt)


def _is_ok(attempt: Any) -> bool:
    """Whether `attempt`, which is over, has ended well; False if that takes a closer look."""
    native = getattr(attempt, "_cython_call", None)
    return native is not None and native.is_ok()

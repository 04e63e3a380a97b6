"""The call objects: one call to its user, one or two attempts beneath. The twin of `grpc_sync.call`.

An attempt's end is noticed through its callback, so that a call which nobody awaits is made again as well.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from grpc.aio import AioRpcError

from interceptors.call import Call, Failure, Send, Surface
from interceptors.grpc_aio.statuses import is_ok, is_provisional, now, said_by, status_now

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interceptors.grpc_aio.requests import IteratedRequests, RequestStream
    from interceptors.source import TokenSource
    from interceptors.tokens import Token

_log = logging.getLogger("interceptors")

_CANCELLED_DETAILS: Final = "Locally cancelled by application!"
_CLOSED_DETAILS: Final = "Channel is closed."
_TRAILERS_ONLY_SECONDS: Final = 0.05
_PROVISIONAL_SECONDS: Final = tuple(0.001 * 2**step for step in range(10))


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

    # Before 1.83, a channel of grpc.aio that is closed looks for its calls in the frames of tasks, and asks each for
    # its channel: ours are none of its own, but their attempts are.
    _channel = None

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
        attempt.add_done_callback(Ending(self))

    def attempt_ended(self, attempt: Any) -> bool:
        """Deals with the end of `attempt`, of which it may be told more than once; True if it has been."""
        if self._requests is None and self._dealings is None and is_ok(attempt):
            self._ended = attempt
            self._over = True
            if self._waiting or self._callbacks:
                self._finish()
            return True
        self._settle(attempt)
        return self._ended is attempt

    def _settle(self, attempt: Any) -> None:
        """Decides, once, what the end of `attempt` means."""
        if self._over or attempt is self._ended or attempt is not self._attempt:
            return
        try:
            if is_ok(attempt):
                self._settle_as(attempt, grpc.StatusCode.OK)
                return
            code = now(attempt.code())
            if code is None or (self._requests is not None and is_provisional(attempt, code)):
                if self._settling is None:
                    self._settling = asyncio.ensure_future(self._settle_once_known(attempt))
                return
            self._settle_as(attempt, code)
        except Exception as error:  # noqa: BLE001 - whoever asks, or calls back, is not the one to raise it to
            # An interceptor beneath has failed with something that is no gRPC error, or a source breaks its contract.
            self._end(None, error)

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
            self._status = status_now(attempt)
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

    async def _settle_once_known(self, attempt: Any) -> None:
        try:
            await self._settle_later(attempt)
        except Exception as error:  # noqa: BLE001 - as in _settle
            self._end(None, error)
        except asyncio.CancelledError:
            self._end_as_cancelled(_CANCELLED_DETAILS)  # as in _wait_for_token
            raise

    async def _settle_later(self, attempt: Any) -> None:
        code = await attempt.code()
        # Most attempts call back once more when the server's status replaces a provisional one, but not those of
        # interceptors beneath.
        for delay in _PROVISIONAL_SECONDS:
            if self._ended is attempt:
                return
            if not is_provisional(attempt, code):
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
            self._requests.free()  # whoever keeps a call that is over does not keep its messages
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
                    return await said_by(await self._final(), "initial_metadata")
            metadata = await attempt.initial_metadata()
            if not metadata and not self._committed and not self._over and self._ended is not attempt:
                # As in the sync twin: of an answer that is all trailers, this may come a moment before the status.
                await asyncio.wait([self._next_change()], timeout=_TRAILERS_ONLY_SECONDS)
            self._notice()
            if self._over:
                return await said_by(await self._final(), "initial_metadata")
            if attempt is not self._ended:
                return metadata
            while self._attempt is attempt and not self._over:
                await self._next_change()
            attempt = self._attempt

    async def trailing_metadata(self) -> Any:
        """See `grpc.aio.Call.trailing_metadata`."""
        return await said_by(await self._final(), "trailing_metadata")

    async def code(self) -> Any:
        """See `grpc.aio.Call.code`."""
        return await said_by(await self._final(), "code")

    async def details(self) -> Any:
        """See `grpc.aio.Call.details`."""
        return await said_by(await self._final(), "details")

    async def debug_error_string(self) -> Any:
        """What gRPC's core says of an error, beyond its details."""
        return await said_by(await self._final(), "debug_error_string")

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


class Ending:
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

"""The call object of `.future()` and of streams: one call to its user, one or two attempts beneath.

It never blocks whoever makes the call nor gRPC's own threads: an attempt's end is noticed through its callback, and a
token is waited for elsewhere. Only who asks for a result, a response or a status waits, as on any gRPC call.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc

from interceptors.call import Call, Failure, Send, Surface
from interceptors.grpc_sync.errors import LocalError, local_error, traceback_of
from interceptors.waiting import on_lent_thread, waiter_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from types import TracebackType

    from interceptors.replay import ReplayableRequests
    from interceptors.source import TokenSource
    from interceptors.tokens import Token

_log = logging.getLogger("interceptors")

_CANCELLED_DETAILS: Final = "Locally cancelled by application!"
_CLOSED_DETAILS: Final = "Channel closed!"
_TRAILERS_ONLY_SECONDS: Final = 0.05


class Attempt(Protocol):
    """What is used of gRPC's own call objects."""

    def add_callback(self, callback: Callable[[], None]) -> bool: ...
    def cancel(self) -> bool: ...
    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str: ...
    def initial_metadata(self) -> Any: ...
    def trailing_metadata(self) -> Any: ...
    def __next__(self) -> Any: ...


class AuthenticatedCall(grpc.RpcError, grpc.Call, grpc.Future):
    """A call that is made once more with another token if its first attempt is refused.

    Args:
        source: Where tokens come from.
        start: Starts an attempt with a token, in so many seconds (None: no limit); must not block.
        call: The call's dealings with its source.
        requests: The request stream, if the call has one.
        waiting: Where the call is noted while it waits for a token.
        blocking_start: Whether `start` may block after all, so that it needs a thread of its own.
    """

    def __init__(
        self,
        source: TokenSource,
        start: Callable[[Token, float | None], Attempt],
        call: Call,
        requests: ReplayableRequests[Any, Any] | None = None,
        *,
        waiting: WaitingCalls | None = None,
        blocking_start: bool = False,
    ) -> None:
        super().__init__()
        self._blocking_start = blocking_start
        self._source = source
        self._start: Callable[[Token, float | None], Attempt] | None = start
        self._call = call
        self._requests = requests
        self._waiting = waiting
        self._changed = threading.Condition()
        self._attempt: Any = None  # the latest; an `Attempt` with whatever else its class can do
        self._token: Token | None = None  # what it carries
        self._ended: Any = None  # the attempt whose end has been dealt with
        self._pending: Future[Token] | None = None
        self._committed = False
        self._over = False
        self._cancelled = False
        self._callbacks: list[Callable[[], Any]] | None = []

    def begin(self, token: Token | None, timeout: float | None) -> None:
        """Makes the first attempt with `token`, or as soon as the source has one."""
        if token is None:
            self._ask(self._call.begin)
        else:
            assert self._start is not None
            self.adopt(token, self._start(token, timeout))

    def adopt(self, token: Token, attempt: Any) -> None:
        """Takes `attempt`, which carries `token`, as the first one."""
        self._token = token
        self._attempt = attempt
        self._watch(attempt)

    # Attempts, one after the other

    def _watch(self, attempt: Attempt) -> None:
        # Weakly, so that a call which nobody holds any more is cancelled, as gRPC does it when an attempt is collected.
        ended = functools.partial(_attempt_ended, weakref.ref(self), weakref.ref(attempt))
        try:
            over = is_done(attempt) or not attempt.add_callback(ended)
        except NotImplementedError:
            # grpc_testing's calls know no callbacks; their code() waits for the end.
            threading.Thread(target=lambda: (attempt.code(), ended()), name="interceptors-end", daemon=True).start()
            return
        if over:
            ended()

    def _settle(self, attempt: Any) -> None:
        """Decides, once, what the end of `attempt` means."""
        code = attempt.code()
        refused = code is grpc.StatusCode.UNAUTHENTICATED
        with self._changed:
            if self._over or attempt is not self._attempt or attempt is self._ended:
                return
            self._ended = attempt
            token = self._token
            assert token is not None
            replayable = (
                refused
                and not self._committed
                and not self._cancelled
                and (self._requests is None or self._requests.rewind())
            )
        if not refused:
            self._call.ended(code.name)
        elif self._call.refused(token, replayable=replayable):
            self._ask(self._call.again)
            return
        with self._changed:
            self._finish()

    def _ask(self, decide: Callable[[Token | BaseException], Send | Failure | Surface]) -> None:
        token = self._source.peek()
        if token is not None:
            self._go_on(decide(token))
            return
        pending = waiter_of(self._source).request(self._call.remaining())
        with self._changed:
            if self._over:
                pending.cancel()
                return
            self._pending = pending
        if self._waiting is not None:
            self._waiting.add(self)
        pending.add_done_callback(functools.partial(_token_came, weakref.ref(self), decide))

    def _go_on(self, decision: Send | Failure | Surface) -> None:
        if isinstance(decision, Send):
            if self._blocking_start:
                threading.Thread(target=self._send, args=(decision,), name="interceptors-attempt", daemon=True).start()
            else:
                self._send(decision)
        elif isinstance(decision, Failure):
            self._end(local_error(decision), decision.cause)
        else:
            self._end(None, decision.cause)

    def _send(self, send: Send) -> None:
        with self._changed:
            start = self._start
        if start is None:  # the call is over
            return
        try:
            attempt = start(send.token, send.timeout)
        except Exception as error:  # noqa: BLE001 - a closed channel, for example; nobody is there to raise it to
            closed = LocalError(grpc.StatusCode.CANCELLED, f"the call could not be started: {type(error).__name__}")
            self._end(None if self._attempt is not None else closed, error)
            return
        with self._changed:
            if self._over:
                attempt.cancel()
                return
            self._attempt = attempt
            self._token = send.token
            self._pending = None
            self._changed.notify_all()
        self._watch(attempt)

    def _end(self, outcome: LocalError | None, cause: BaseException | None) -> None:
        """Ends the call without a further attempt: with `outcome`, or as the latest attempt ended."""
        with self._changed:
            if self._over:
                return
            if outcome is not None:
                self._attempt = outcome
            self.__cause__ = cause
            self._finish()
        self._run_callbacks()

    def _finish(self) -> None:
        self._over = True
        self._pending = None
        if self._requests is not None:
            self._requests.stop()
        # Whoever keeps a call that is over does not keep its messages and the caller's iterator.
        self._requests = self._start = None
        if self._waiting is not None:
            self._waiting.discard(self)
        self._changed.notify_all()

    def _run_callbacks(self) -> None:
        with self._changed:
            callbacks, self._callbacks = self._callbacks, None
        _pinned.discard(self)
        if callbacks and on_lent_thread():
            threading.Thread(target=_run_each, args=(callbacks,), name="interceptors-callbacks", daemon=True).start()
        else:
            _run_each(callbacks or ())

    def _commit(self, attempt: Any) -> bool:
        """The caller receives the first response of `attempt`; False if another attempt has taken its place."""
        with self._changed:
            if attempt is not self._attempt or (attempt is self._ended and not self._over):
                return False
            self._committed = True
            requests = self._requests
        if requests is not None:
            requests.free()
        self._call.passed()
        return True

    # Waiting

    def _notice(self) -> None:
        """Deals with an attempt that is over although its callback has not come yet."""
        attempt = self._attempt
        if attempt is not None and attempt is not self._ended and not self._over and _is_known_to_be_done(attempt):
            self._settle(attempt)

    def _when_over(self, timeout: float | None = None) -> Any:
        """The final attempt, once it is over. gRPC's single-threaded streams are asked at once: they never block."""
        self._notice()
        with self._changed:
            if not self._changed.wait_for(lambda: self._over or self._is_driven_by_its_reader(), timeout):
                raise grpc.FutureTimeoutError
            return self._attempt

    def _is_driven_by_its_reader(self) -> bool:
        return _is_single_threaded(self._attempt) and self._attempt is not self._ended

    def _is_over(self, attempt: Any) -> bool:
        return self._over or self._ended is attempt

    def _after(self, attempt: Any) -> Any:
        """The attempt that follows `attempt`, once it has begun, or `attempt` if none will."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._attempt is not attempt)
            return self._attempt

    # Responses

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        attempt = self._attempt
        if attempt is None:
            attempt = self._after(None)
        while True:
            try:
                response = next(attempt)
            except grpc.RpcError as error:
                # gRPC raises the attempt itself, grpc_testing another object that tells of its end.
                if error is not attempt and not isinstance(error, grpc.Call):
                    raise
            else:
                if self._committed or self._commit(attempt):
                    return response
            self._settle(attempt)
            following = self._after(attempt)
            if following is attempt:
                raise self from self.__cause__
            attempt = following

    next = __next__

    # grpc.Call and grpc.RpcContext

    def initial_metadata(self) -> Any:
        """See `grpc.Call.initial_metadata`."""
        attempt = self._after(None)
        while True:
            metadata = attempt.initial_metadata()
            if not metadata and not self._committed and not _is_single_threaded(attempt):
                # Of an answer that is all trailers, gRPC reports the (empty) initial metadata a moment before the
                # status; in that moment it is not known yet whether this is the final attempt.
                with self._changed:
                    self._changed.wait_for(functools.partial(self._is_over, attempt), _TRAILERS_ONLY_SECONDS)
            self._notice()
            if self._over or attempt is not self._ended:
                return self._attempt.initial_metadata() if self._over else metadata
            attempt = self._after(attempt)

    def trailing_metadata(self) -> Any:
        """See `grpc.Call.trailing_metadata`."""
        return self._when_over().trailing_metadata()

    def code(self) -> Any:
        """See `grpc.Call.code`."""
        return self._when_over().code()

    def details(self) -> Any:
        """See `grpc.Call.details`."""
        return self._when_over().details()

    def debug_error_string(self) -> Any:
        """What gRPC's core says of an error, beyond its details."""
        return self._when_over().debug_error_string()

    def is_active(self) -> bool:
        """See `grpc.RpcContext.is_active`."""
        self._notice()
        return not self._over

    def time_remaining(self) -> Any:
        """See `grpc.RpcContext.time_remaining`."""
        return self._call.remaining()

    def cancel(self) -> bool:
        """See `grpc.RpcContext.cancel`: stops the attempt in flight, a pending retry, and the pulling of requests."""
        self._notice()
        with self._changed:
            if self._over:
                return False
            self._cancelled = True
            attempt = None if self._attempt is self._ended else self._attempt
            pending = self._pending
            requests = self._requests
        if requests is not None:
            requests.stop()
        if attempt is not None:
            return bool(attempt.cancel())
        if pending is not None:
            pending.cancel()
        self._end(LocalError(grpc.StatusCode.CANCELLED, _CANCELLED_DETAILS), None)
        return True

    def channel_closed(self) -> None:
        """Ends the call, which waits for a token that nothing can be sent with any more."""
        self._end(LocalError(grpc.StatusCode.CANCELLED, _CLOSED_DETAILS), None)

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """See `grpc.RpcContext.add_callback`."""
        with self._changed:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            _pinned.add(self)
            return True

    # grpc.Future

    def cancelled(self) -> bool:
        """See `grpc.Future.cancelled`."""
        return self._cancelled

    def running(self) -> bool:
        """See `grpc.Future.running`."""
        return self.is_active()

    def done(self) -> bool:
        """See `grpc.Future.done`."""
        return not self.is_active()

    def result(self, timeout: float | None = None) -> Any:
        """See `grpc.Future.result`."""
        outcome = self._outcome(timeout)
        if outcome is None:
            return self._attempt.result()
        raise outcome from outcome.__cause__

    def exception(self, timeout: float | None = None) -> Exception | None:
        """See `grpc.Future.exception`."""
        return self._outcome(timeout)

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        """See `grpc.Future.traceback`."""
        outcome = self._outcome(timeout)
        return None if outcome is None else traceback_of(outcome)

    def _outcome(self, timeout: float | None) -> Exception | None:
        attempt = self._when_over(timeout)
        if not self._over:
            attempt.result()  # raises gRPC's own UsageError
        if attempt.code() is grpc.StatusCode.OK:
            return None
        if self._cancelled:
            raise grpc.FutureCancelledError
        # An interceptor beneath may have failed with something that is no gRPC error.
        said = attempt.exception() if hasattr(attempt, "exception") else None
        return self if said is None or isinstance(said, grpc.RpcError) else said

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        """See `grpc.Future.add_done_callback`."""
        if not self.add_callback(functools.partial(fn, self)):
            fn(self)

    def __repr__(self) -> str:
        attempt = self._attempt
        if attempt is None or (attempt is self._ended and not self._over):
            return f"<{type(self).__name__} object>"
        return repr(attempt).replace(type(attempt).__name__, type(self).__name__)

    __str__ = __repr__

    def __del__(self) -> None:
        requests = self._requests
        if requests is not None:
            requests.stop()


class WaitingCalls:
    """The calls of a channel that wait for a token: gRPC, which has none of them at that time, cannot end them."""

    def __init__(self) -> None:
        self._calls: dict[int, weakref.ref[AuthenticatedCall]] = {}

    def add(self, call: AuthenticatedCall) -> None:
        """Notes a call."""
        number = id(call)
        self._calls[number] = weakref.ref(call, lambda _: self._calls.pop(number, None))

    def discard(self, call: AuthenticatedCall) -> None:
        """Forgets a call."""
        self._calls.pop(id(call), None)

    def channel_closed(self) -> None:
        """Ends them all."""
        while self._calls:
            _, call_of = self._calls.popitem()
            call = call_of()
            if call is not None:
                call.channel_closed()


# Calls whose users wait to be called back and may hold no other reference.
_pinned: set[AuthenticatedCall] = set()


def is_native(thing: object, name: str) -> bool:
    """Whether `thing` is of gRPC's own class `name`; by its name, as gRPC imports its module only when it is used."""
    kind = type(thing)
    return kind.__name__ == name and kind.__module__ == "grpc._channel"


def _is_single_threaded(attempt: Any) -> bool:
    return is_native(attempt, "_SingleThreadedRendezvous")


def is_done(attempt: Any) -> bool:
    """Whether a gRPC call object of any make is over; grpc_testing's raise NotImplementedError."""
    return bool(attempt.done()) if hasattr(attempt, "done") else not attempt.is_active()


def _is_known_to_be_done(attempt: Any) -> bool:
    try:
        return is_done(attempt)
    except NotImplementedError:
        return False


def _run_each(callbacks: Iterable[Callable[[], Any]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:  # noqa: BLE001 - as gRPC does it: no thread of its or ours may die of a user's callback
            _log.exception("Exception in callback %r", callback)


def _attempt_ended(call_of: weakref.ref[AuthenticatedCall], attempt_of: weakref.ref[Any]) -> None:
    call, attempt = call_of(), attempt_of()
    if call is None or attempt is None:
        return
    try:
        call._settle(attempt)  # noqa: SLF001
    except Exception as error:  # noqa: BLE001 - a source that breaks its contract must not leave the caller waiting
        call._end(None, error)  # noqa: SLF001
    if call._over:  # noqa: SLF001
        call._run_callbacks()  # noqa: SLF001


def _token_came(
    call_of: weakref.ref[AuthenticatedCall],
    decide: Callable[[Token | BaseException], Send | Failure | Surface],
    pending: Future[Token],
) -> None:
    call = call_of()
    if call is not None and not pending.cancelled():
        call._go_on(decide(pending.exception() or pending.result()))  # noqa: SLF001

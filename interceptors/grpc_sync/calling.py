"""How a call of a plain multicallable becomes one or two attempts, blocking or not; every way in drives this."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import grpc

from interceptors.call import Call, Failure, Send, carries_own_authorization, deadline_of
from interceptors.grpc_sync.call import AuthenticatedCall, WaitingCalls
from interceptors.grpc_sync.errors import local_error
from interceptors.messages import prepared, size_of, snapshot
from interceptors.replay import ReplayableRequests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from interceptors.source import TokenSource
    from interceptors.tokens import Token

UNAUTHENTICATED: Final = grpc.StatusCode.UNAUTHENTICATED


def start_call(
    source: TokenSource,
    invoke: Callable[[float | None, Any, Any], Any],
    timeout: float | None,
    metadata: Any,
    credentials: Any,
    waiting: WaitingCalls | None,
    requests: ReplayableRequests[Any, Any] | None = None,
) -> Any:
    """Starts a call; never waits. `invoke(timeout, metadata, credentials)` starts an attempt."""
    metadata = None if metadata is None else tuple(metadata)
    if is_untouched(metadata, credentials):
        if requests is not None:
            requests.free()
        return invoke(timeout, metadata, credentials)
    attempt = functools.partial(start_attempt, invoke, metadata)
    call = AuthenticatedCall(source, attempt, Call(source, deadline_of(timeout)), requests, waiting=waiting)
    call.begin(source.peek(), timeout)
    return call


def blocking_call(
    source: TokenSource,
    invoke: Callable[[float | None, Any, Any], Any],
    timeout: float | None,
    metadata: Any,
    credentials: Any,
    requests: ReplayableRequests[Any, Any] | None = None,
) -> Any:
    """Makes a call and waits for its end. `invoke(timeout, metadata, credentials)` makes an attempt."""
    metadata = None if metadata is None else tuple(metadata)
    if is_untouched(metadata, credentials):
        if requests is not None:
            requests.free()
        return invoke(timeout, metadata, credentials)
    call = Call(source, deadline_of(timeout))
    token = source.peek()
    if token is None:
        token, timeout = first_token(call)
    attempt = functools.partial(start_attempt, invoke, metadata)
    try:
        try:
            return attempted(call, attempt, token, timeout)
        except grpc.RpcError as error:
            if code_of(error) is not UNAUTHENTICATED:
                raise
            refusal = error
        try:
            return invoke_again(call, token, refusal, attempt, requests)
        finally:
            del refusal  # breaks the cycle of error, traceback and this frame
    finally:
        if requests is not None:
            requests.stop()


def is_untouched(metadata: tuple[Any, ...] | None, credentials: Any) -> bool:
    """Whether a call brings its own credentials, so that it is sent as it is."""
    return credentials is not None or (metadata is not None and carries_own_authorization(metadata))


def first_token(call: Call) -> tuple[Token, float | None]:
    """Waits for a token for a first attempt; returns it and what is left of the timeout."""
    decision = call.begin(call.ask())
    if isinstance(decision, Failure):
        raise local_error(decision)
    return decision.token, decision.timeout


def invoke_again(
    call: Call,
    token: Token,
    refusal: grpc.RpcError,
    attempt: Callable[[Token, float | None], Any],
    requests: ReplayableRequests[Any, Any] | None = None,
) -> Any:
    """What becomes of a blocking call whose first attempt, made with `token`, ended with `refusal`."""
    if not call.refused(token, replayable=requests is None or requests.rewind()):
        raise refusal
    decision = call.again(call.ask())
    if isinstance(decision, Failure):
        raise local_error(decision)
    if not isinstance(decision, Send):
        raise refusal from decision.cause
    try:
        return attempted(call, attempt, decision.token, decision.timeout)
    except grpc.RpcError as error:
        if code_of(error) is UNAUTHENTICATED:
            call.refused(decision.token)
        raise


def attempted(call: Call, attempt: Callable[[Token, float | None], Any], token: Token, timeout: float | None) -> Any:
    """What a blocking attempt returns; `call` hears how it ended, unless it was refused."""
    try:
        result = attempt(token, timeout)
    except grpc.RpcError as error:
        code = code_of(error)
        if code is not None and code is not UNAUTHENTICATED:
            call.ended(code.name)
        raise
    call.passed()
    return result


def code_of(error: grpc.RpcError) -> grpc.StatusCode | None:
    """The status that `error` tells of; None if it is a bare one, as interceptors may raise it."""
    code = getattr(error, "code", None)
    return None if code is None else code()


def replayable(
    request_iterator: Iterator[Any], prepare: Callable[[Any], Any], limit: int
) -> ReplayableRequests[Any, Any]:
    """The caller's requests, kept as `prepare` makes them."""
    if prepare is snapshot:
        return ReplayableRequests(request_iterator, prepare, size_of, limit)
    return ReplayableRequests(request_iterator, functools.partial(prepared, prepare), _length, limit)


def _length(message: Any) -> int:
    return 0 if message is None else len(message)


def attached(token: Token, metadata: tuple[Any, ...] | None) -> Any:
    """The caller's metadata, in order, and the token."""
    return (*metadata, *token.metadata) if metadata else token.metadata


def redacted(error: ValueError, token: Token) -> ValueError:
    """`error` without the token, which gRPC shows when other metadata is invalid."""
    return ValueError(*(arg.replace(token.value, "***") if isinstance(arg, str) else arg for arg in error.args))


def invoke_with(
    invoke: Callable[..., Any],
    message: Any,
    wait_for_ready: bool | None,
    compression: Any,
    timeout: float | None,
    metadata: Any,
    credentials: Any,
) -> Any:
    """Makes an attempt of a plain multicallable's method, `invoke`."""
    if wait_for_ready is None and compression is None:
        # Channels that are not gRPC's own, grpc_testing's for one, may not know the other two.
        return invoke(message, timeout, metadata, credentials)
    return invoke(message, timeout, metadata, credentials, wait_for_ready, compression)


def invoke_with_requests(
    invoke: Callable[..., Any],
    requests: ReplayableRequests[Any, Any],
    wait_for_ready: bool | None,
    compression: Any,
    timeout: float | None,
    metadata: Any,
    credentials: Any,
) -> Any:
    """`invoke_with` for a request stream: each attempt has an iterator of its own."""
    return invoke_with(invoke, requests.attempt(), wait_for_ready, compression, timeout, metadata, credentials)


def start_attempt(
    invoke: Callable[[float | None, Any, Any], Any], metadata: Any, token: Token, timeout: float | None
) -> Any:
    """Makes an attempt that carries `token` beside the caller's metadata."""
    try:
        return invoke(timeout, attached(token, metadata), None)
    except ValueError as error:
        raise redacted(error, token) from None

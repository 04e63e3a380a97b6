"""A channel of our own over a plain one: its multicallables keep the plain multicallables and attach tokens.

gRPC's own interceptor machinery costs more than the token; this costs next to nothing while the token is fresh.
"""

from __future__ import annotations

import copy
import functools
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from interceptors.call import REPLAY_LIMIT, Call, Failure, Send, carries_own_authorization, deadline_of
from interceptors.grpc_sync.call import AuthenticatedCall, WaitingCalls, is_native, local_error
from interceptors.messages import as_it_is, log_unserialisable, prepared, size_of, snapshot
from interceptors.replay import ReplayableRequests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from interceptors.source import TokenSource
    from interceptors.tokens import Token

UNAUTHENTICATED: Final = grpc.StatusCode.UNAUTHENTICATED


class AuthenticatedChannel(grpc.Channel):
    """A `grpc.Channel` whose calls carry tokens; see `interceptors.intercept_channel`.

    Args:
        channel: The channel to call through.
        source: Where tokens come from.
        replay_limit: Bytes of a request stream that are kept for a second attempt.
    """

    def __init__(self, channel: grpc.Channel, source: TokenSource, replay_limit: int = REPLAY_LIMIT) -> None:
        self._channel = channel
        self._source = source
        self._replay_limit = replay_limit
        self._waiting = WaitingCalls()

    def _multicallable(
        self, kind: str, method: str, serializer: Any, deserializer: Any, options: dict[str, Any]
    ) -> tuple[Any, Callable[[Any], Any]]:
        make = getattr(self._channel, kind)
        if is_native(self._channel, "Channel"):
            # Serialising here and not beneath costs nothing more, and what is replayed is what was sent.
            return make(method, None, deserializer, **options), serializer or as_it_is
        # Interceptors and test channels beneath want to see the message.
        return make(method, serializer, deserializer, **options), snapshot

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, *args: Any, **options: Any
    ) -> grpc.UnaryUnaryMultiCallable:
        """See `grpc.Channel.unary_unary`."""
        options = _registered(args, options)
        inner, prepare = self._multicallable("unary_unary", method, request_serializer, response_deserializer, options)
        return UnaryUnary(inner, self._source, prepare, self._waiting)

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, *args: Any, **options: Any
    ) -> grpc.UnaryStreamMultiCallable:
        """See `grpc.Channel.unary_stream`."""
        options = _registered(args, options)
        inner, prepare = self._multicallable("unary_stream", method, request_serializer, response_deserializer, options)
        return UnaryStream(inner, self._source, prepare, self._waiting)

    def stream_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, *args: Any, **options: Any
    ) -> grpc.StreamUnaryMultiCallable:
        """See `grpc.Channel.stream_unary`."""
        options = _registered(args, options)
        inner, prepare = self._multicallable("stream_unary", method, request_serializer, response_deserializer, options)
        return StreamUnary(inner, self._source, prepare, self._replay_limit, self._waiting)

    def stream_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, *args: Any, **options: Any
    ) -> grpc.StreamStreamMultiCallable:
        """See `grpc.Channel.stream_stream`."""
        options = _registered(args, options)
        inner, prepare = self._multicallable(
            "stream_stream", method, request_serializer, response_deserializer, options
        )
        return StreamStream(inner, self._source, prepare, self._replay_limit, self._waiting)

    def subscribe(self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool = False) -> None:
        """See `grpc.Channel.subscribe`."""
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        """See `grpc.Channel.unsubscribe`."""
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        """See `grpc.Channel.close`. The source is left open: it may serve other channels."""
        self._channel.close()
        self._waiting.channel_closed()

    def __enter__(self) -> Self:
        self._channel.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return self._channel.__exit__(kind, error, traceback)
        finally:
            self._waiting.channel_closed()

    def __getattr__(self, name: str) -> Any:
        # What gRPC has added to its channels and tools beside it rely on.
        if name == "_channel":
            raise AttributeError(name)
        return getattr(self._channel, name)

    def __repr__(self) -> str:
        return f"<AuthenticatedChannel over {self._channel!r}>"


class UnaryUnary(grpc.UnaryUnaryMultiCallable):
    """Unary calls that carry tokens."""

    __slots__ = ("_inner", "_peek", "_prepare", "_source", "_waiting")

    def __init__(
        self,
        inner: grpc.UnaryUnaryMultiCallable,
        source: TokenSource,
        prepare: Callable[[Any], Any],
        waiting: WaitingCalls | None = None,
    ) -> None:
        self._inner = inner
        self._source = source
        self._prepare = prepare
        self._waiting = waiting
        self._peek = source.peek

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.UnaryUnaryMultiCallable.__call__`."""
        token = self._peek()
        if token is None or metadata is not None or credentials is not None:
            return self._blocking(self._inner, request, timeout, metadata, credentials, wait_for_ready, compression)
        # The hot path: `_blocking` without what a fresh token and no metadata of the caller's do not need.
        deadline = None if timeout is None else monotonic() + timeout
        try:
            message = self._prepare(request)
        except Exception:  # noqa: BLE001 - it ends the call
            message = None
            log_unserialisable()
        try:
            if wait_for_ready is None and compression is None:
                return self._inner(message, timeout, token.metadata)
            return self._inner(message, timeout, token.metadata, None, wait_for_ready, compression)
        except grpc.RpcError as error:
            if code_of(error) is not UNAUTHENTICATED:
                raise
            refusal = error
        try:
            start = functools.partial(_invoke, self._inner, message, wait_for_ready, compression)
            attempt = functools.partial(_start_attempt, start, None)
            return invoke_again(Call(self._source, deadline), token, refusal, attempt)
        finally:
            del refusal  # breaks the cycle of error, traceback and this frame

    def with_call(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.UnaryUnaryMultiCallable.with_call`."""
        invoke = self._inner.with_call
        return self._blocking(invoke, request, timeout, metadata, credentials, wait_for_ready, compression)

    def _blocking(
        self,
        invoke: Callable[..., Any],
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
    ) -> Any:
        message = prepared(self._prepare, request)
        start = functools.partial(_invoke, invoke, message, wait_for_ready, compression)
        metadata = None if metadata is None else tuple(metadata)
        if credentials is not None or (metadata and carries_own_authorization(metadata)):
            return start(timeout, metadata, credentials)
        call = Call(self._source, deadline_of(timeout))
        token = self._peek()
        if token is None:
            token, timeout = first_token(call)
        attempt = functools.partial(_start_attempt, start, metadata)
        try:
            return attempted(call, attempt, token, timeout)
        except grpc.RpcError as error:
            if code_of(error) is not UNAUTHENTICATED:
                raise
            refusal = error
        try:
            return invoke_again(call, token, refusal, attempt)
        finally:
            del refusal

    def future(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.UnaryUnaryMultiCallable.future`. Does not wait for a token."""
        message = prepared(self._prepare, request)
        return start_call(
            self._source,
            functools.partial(_invoke, self._inner.future, message, wait_for_ready, compression),
            timeout,
            metadata,
            credentials,
            self._waiting,
        )


class UnaryStream(grpc.UnaryStreamMultiCallable):
    """Server streams that carry tokens."""

    __slots__ = ("_inner", "_prepare", "_source", "_waiting")

    def __init__(
        self,
        inner: grpc.UnaryStreamMultiCallable,
        source: TokenSource,
        prepare: Callable[[Any], Any],
        waiting: WaitingCalls | None = None,
    ) -> None:
        self._inner = inner
        self._source = source
        self._prepare = prepare
        self._waiting = waiting

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.UnaryStreamMultiCallable.__call__`. Does not wait for a token."""
        message = prepared(self._prepare, request)
        return start_call(
            self._source,
            functools.partial(_invoke, self._inner, message, wait_for_ready, compression),
            timeout,
            metadata,
            credentials,
            self._waiting,
        )


class StreamUnary(grpc.StreamUnaryMultiCallable):
    """Client streams that carry tokens."""

    __slots__ = ("_inner", "_prepare", "_replay_limit", "_source", "_waiting")

    def __init__(
        self,
        inner: grpc.StreamUnaryMultiCallable,
        source: TokenSource,
        prepare: Callable[[Any], Any],
        replay_limit: int,
        waiting: WaitingCalls | None = None,
    ) -> None:
        self._inner = inner
        self._source = source
        self._prepare = prepare
        self._replay_limit = replay_limit
        self._waiting = waiting

    def __call__(
        self,
        request_iterator: Iterator[Any],
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.StreamUnaryMultiCallable.__call__`."""
        invoke = self._inner
        return self._blocking(invoke, request_iterator, timeout, metadata, credentials, wait_for_ready, compression)

    def with_call(
        self,
        request_iterator: Iterator[Any],
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.StreamUnaryMultiCallable.with_call`."""
        invoke = self._inner.with_call
        return self._blocking(invoke, request_iterator, timeout, metadata, credentials, wait_for_ready, compression)

    def _blocking(
        self,
        invoke: Callable[..., Any],
        request_iterator: Iterator[Any],
        timeout: float | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
    ) -> Any:
        if metadata is not None:
            metadata = tuple(metadata)
        if credentials is not None or (metadata and carries_own_authorization(metadata)):
            requests = replayable(request_iterator, self._prepare, 0)
            return _invoke(invoke, requests.attempt(), wait_for_ready, compression, timeout, metadata, credentials)
        call = Call(self._source, deadline_of(timeout))
        token = self._source.peek()
        if token is None:
            token, timeout = first_token(call)
        requests = replayable(request_iterator, self._prepare, self._replay_limit)

        def attempt(token: Token, timeout: float | None) -> Any:
            metadata_sent = attached(token, metadata)
            return _invoke(invoke, requests.attempt(), wait_for_ready, compression, timeout, metadata_sent, None)

        refusal = None
        try:
            return attempted(call, attempt, token, timeout)
        except grpc.RpcError as error:
            if code_of(error) is not UNAUTHENTICATED:
                raise
            refusal = error
        except ValueError as error:
            raise redacted(error, token) from None
        finally:
            if refusal is None:
                requests.stop()
        try:
            return invoke_again(call, token, refusal, attempt, replayable=requests.rewind())
        finally:
            requests.stop()
            del refusal

    def future(
        self,
        request_iterator: Iterator[Any],
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.StreamUnaryMultiCallable.future`. Does not wait for a token."""
        return start_streaming_call(
            self._source,
            functools.partial(_invoke_streaming, self._inner.future, wait_for_ready, compression),
            replayable(request_iterator, self._prepare, self._replay_limit),
            timeout,
            metadata,
            credentials,
            self._waiting,
        )


class StreamStream(grpc.StreamStreamMultiCallable):
    """Bidirectional streams that carry tokens."""

    __slots__ = ("_inner", "_prepare", "_replay_limit", "_source", "_waiting")

    def __init__(
        self,
        inner: grpc.StreamStreamMultiCallable,
        source: TokenSource,
        prepare: Callable[[Any], Any],
        replay_limit: int,
        waiting: WaitingCalls | None = None,
    ) -> None:
        self._inner = inner
        self._source = source
        self._prepare = prepare
        self._replay_limit = replay_limit
        self._waiting = waiting

    def __call__(
        self,
        request_iterator: Iterator[Any],
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.StreamStreamMultiCallable.__call__`. Does not wait for a token."""
        return start_streaming_call(
            self._source,
            functools.partial(_invoke_streaming, self._inner, wait_for_ready, compression),
            replayable(request_iterator, self._prepare, self._replay_limit),
            timeout,
            metadata,
            credentials,
            self._waiting,
        )


def authenticated_multicallable(inner: Any, source: TokenSource, replay_limit: int) -> Any:
    """One of a stub's multicallables, with tokens; for `interceptors.intercept_stub`."""
    prepare: Callable[[Any], Any] = snapshot
    if type(inner).__module__ == "grpc._channel" and hasattr(inner, "_request_serializer"):
        prepare = inner._request_serializer or as_it_is  # noqa: SLF001 - a stub has no public way to its serialisers
        inner = copy.copy(inner)
        inner._request_serializer = None  # noqa: SLF001
    # By name first: grpc_testing's UnaryStream says that it is a StreamStreamMultiCallable.
    name = type(inner).__name__
    if isinstance(inner, grpc.UnaryUnaryMultiCallable):
        return UnaryUnary(inner, source, prepare)
    if isinstance(inner, grpc.UnaryStreamMultiCallable) or "UnaryStream" in name:
        return UnaryStream(inner, source, prepare)
    if isinstance(inner, grpc.StreamUnaryMultiCallable):
        return StreamUnary(inner, source, prepare, replay_limit)
    return StreamStream(inner, source, prepare, replay_limit)


# Shared with the native interceptor


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
    *,
    replayable: bool = True,
) -> Any:
    """What becomes of a blocking call whose first attempt, made with `token`, ended with `refusal`."""
    if not call.refused(token, replayable=replayable):
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


def start_call(
    source: TokenSource,
    invoke: Callable[[float | None, Any, Any], Any],
    timeout: float | None,
    metadata: Any,
    credentials: Any,
    waiting: WaitingCalls | None,
) -> Any:
    """Starts a call with one request; `invoke(timeout, metadata, credentials)` starts an attempt. Never waits."""
    metadata = None if metadata is None else tuple(metadata)
    if credentials is not None or (metadata and carries_own_authorization(metadata)):
        return invoke(timeout, metadata, credentials)
    call = AuthenticatedCall(
        source,
        functools.partial(_start_attempt, invoke, metadata),
        Call(source, deadline_of(timeout)),
        waiting=waiting,
    )
    call.begin(source.peek(), timeout)
    return call


def start_streaming_call(
    source: TokenSource,
    invoke: Callable[[Iterator[Any], float | None, Any, Any], Any],
    requests: ReplayableRequests[Any, Any],
    timeout: float | None,
    metadata: Any,
    credentials: Any,
    waiting: WaitingCalls | None,
) -> Any:
    """`start_call` for a request stream; `invoke` takes the requests first."""
    metadata = None if metadata is None else tuple(metadata)
    if credentials is not None or (metadata and carries_own_authorization(metadata)):
        requests.free()
        return invoke(requests.attempt(), timeout, metadata, credentials)
    call = AuthenticatedCall(
        source,
        functools.partial(_start_streaming_attempt, invoke, requests, metadata),
        Call(source, deadline_of(timeout)),
        requests,
        waiting=waiting,
    )
    call.begin(source.peek(), timeout)
    return call


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


def _invoke(
    invoke: Callable[..., Any],
    message: Any,
    wait_for_ready: bool | None,
    compression: Any,
    timeout: float | None,
    metadata: Any,
    credentials: Any,
) -> Any:
    if wait_for_ready is None and compression is None:
        # Channels that are not gRPC's own, grpc_testing's for one, may not know the other two.
        return invoke(message, timeout, metadata, credentials)
    return invoke(message, timeout, metadata, credentials, wait_for_ready, compression)


def _invoke_streaming(
    invoke: Callable[..., Any],
    wait_for_ready: bool | None,
    compression: Any,
    messages: Any,
    timeout: float | None,
    metadata: Any,
    credentials: Any,
) -> Any:
    return _invoke(invoke, messages, wait_for_ready, compression, timeout, metadata, credentials)


def _start_attempt(
    invoke: Callable[[float | None, Any, Any], Any], metadata: Any, token: Token, timeout: float | None
) -> Any:
    try:
        return invoke(timeout, attached(token, metadata), None)
    except ValueError as error:
        raise redacted(error, token) from None


def _start_streaming_attempt(
    invoke: Callable[[Iterator[Any], float | None, Any, Any], Any],
    requests: ReplayableRequests[Any, Any],
    metadata: Any,
    token: Token,
    timeout: float | None,
) -> Any:
    return _start_attempt(functools.partial(invoke, requests.attempt()), metadata, token, timeout)


def _registered(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    if args:
        options["_registered_method"] = args[0]
    return options if options.get("_registered_method") else {}

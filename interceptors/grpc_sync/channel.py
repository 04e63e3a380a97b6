"""A channel of our own over a plain one: its multicallables keep the plain multicallables and attach tokens.

gRPC's own interceptor machinery costs more than the token; this costs next to nothing while the token is fresh.
"""

from __future__ import annotations

import copy
import functools
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

import grpc

from interceptors.call import REPLAY_LIMIT, Call
from interceptors.grpc_sync.call import WaitingCalls, is_native
from interceptors.grpc_sync.calling import (
    UNAUTHENTICATED,
    blocking_call,
    code_of,
    invoke_again,
    invoke_with,
    invoke_with_requests,
    replayable,
    start_attempt,
    start_call,
)
from interceptors.messages import as_it_is, log_unserialisable, prepared, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from interceptors.replay import ReplayableRequests
    from interceptors.source import TokenSource

    Attempts = Callable[[float | None, Any, Any], Any]


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
        return UnaryUnary(inner, self._source, prepare, self._replay_limit, self._waiting)

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, *args: Any, **options: Any
    ) -> grpc.UnaryStreamMultiCallable:
        """See `grpc.Channel.unary_stream`."""
        options = _registered(args, options)
        inner, prepare = self._multicallable("unary_stream", method, request_serializer, response_deserializer, options)
        return UnaryStream(inner, self._source, prepare, self._replay_limit, self._waiting)

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


class _MultiCallable:
    """What the four kinds have in common: how the arguments of an invocation become a call."""

    __slots__ = ("_inner", "_peek", "_prepare", "_replay_limit", "_source", "_waiting")

    def __init__(
        self,
        inner: Any,
        source: TokenSource,
        prepare: Callable[[Any], Any],
        replay_limit: int,
        waiting: WaitingCalls | None = None,
    ) -> None:
        self._inner = inner
        self._source = source
        self._peek = source.peek
        self._prepare = prepare
        self._replay_limit = replay_limit
        self._waiting = waiting

    def _start(
        self, invoke: Any, given: Any, timeout: float | None, metadata: Any, credentials: Any, *options: Any
    ) -> Any:
        attempt, requests = self._attempts(invoke, given, *options)
        return start_call(self._source, attempt, timeout, metadata, credentials, self._waiting, requests)

    def _blocking(
        self, invoke: Any, given: Any, timeout: float | None, metadata: Any, credentials: Any, *options: Any
    ) -> Any:
        attempt, requests = self._attempts(invoke, given, *options)
        return blocking_call(self._source, attempt, timeout, metadata, credentials, requests)

    def _attempts(self, invoke: Any, request: Any, *options: Any) -> tuple[Attempts, ReplayableRequests | None]:
        return functools.partial(invoke_with, invoke, prepared(self._prepare, request), *options), None


class _OfManyRequests(_MultiCallable):
    __slots__ = ()

    def _attempts(
        self, invoke: Any, request_iterator: Iterator[Any], *options: Any
    ) -> tuple[Attempts, ReplayableRequests]:
        requests = replayable(request_iterator, self._prepare, self._replay_limit)
        return functools.partial(invoke_with_requests, invoke, requests, *options), requests


class UnaryUnary(_MultiCallable, grpc.UnaryUnaryMultiCallable):
    """Unary calls that carry tokens."""

    __slots__ = ()

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
            start = functools.partial(invoke_with, self._inner, message, wait_for_ready, compression)
            attempt = functools.partial(start_attempt, start, None)
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
        invoke = self._inner.future
        return self._start(invoke, request, timeout, metadata, credentials, wait_for_ready, compression)


class UnaryStream(_MultiCallable, grpc.UnaryStreamMultiCallable):
    """Server streams that carry tokens."""

    __slots__ = ()

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
        return self._start(self._inner, request, timeout, metadata, credentials, wait_for_ready, compression)


class StreamUnary(_OfManyRequests, grpc.StreamUnaryMultiCallable):
    """Client streams that carry tokens."""

    __slots__ = ()

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
        invoke = self._inner.future
        return self._start(invoke, request_iterator, timeout, metadata, credentials, wait_for_ready, compression)


class StreamStream(_OfManyRequests, grpc.StreamStreamMultiCallable):
    """Bidirectional streams that carry tokens."""

    __slots__ = ()

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
        invoke = self._inner
        return self._start(invoke, request_iterator, timeout, metadata, credentials, wait_for_ready, compression)


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
        return UnaryUnary(inner, source, prepare, replay_limit)
    if isinstance(inner, grpc.UnaryStreamMultiCallable) or "UnaryStream" in name:
        return UnaryStream(inner, source, prepare, replay_limit)
    if isinstance(inner, grpc.StreamUnaryMultiCallable):
        return StreamUnary(inner, source, prepare, replay_limit)
    return StreamStream(inner, source, prepare, replay_limit)


def _registered(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    if args:
        options["_registered_method"] = args[0]
    return options if options.get("_registered_method") else {}

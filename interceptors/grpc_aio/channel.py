"""A channel of our own over a plain one. The twin of `grpc_sync.channel`.

grpc.aio offers no way to intercept a channel that exists, and its interceptors change what calls do.
"""

from __future__ import annotations

import copy
import functools
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Self

import grpc
import grpc.aio

from interceptors.call import REPLAY_LIMIT, carries_own_authorization, deadline_of
from interceptors.grpc_aio.call import AuthenticatedCall, WaitingCalls
from interceptors.grpc_aio.kinds import StreamStreamCall, StreamUnaryCall, UnaryStreamCall, UnaryUnaryCall
from interceptors.grpc_aio.requests import IteratedRequests, RequestStream
from interceptors.messages import as_it_is, log_unserialisable, prepared, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from interceptors.source import TokenSource
    from interceptors.tokens import Token


class AuthenticatedAioChannel(grpc.aio.Channel):
    """A `grpc.aio.Channel` whose calls carry tokens; see `interceptors.intercept_channel`.

    Args:
        channel: The channel to call through.
        source: Where tokens come from.
        replay_limit: Bytes of a request stream that are kept for a second attempt.
    """

    def __init__(self, channel: grpc.aio.Channel, source: TokenSource, replay_limit: int = REPLAY_LIMIT) -> None:
        self._channel = channel
        self._source = source
        self._replay_limit = replay_limit
        self._waiting = WaitingCalls()

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        """See `grpc.aio.Channel.unary_unary`."""
        return self._authenticated(self._channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        """See `grpc.aio.Channel.unary_stream`."""
        return self._authenticated(self._channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        """See `grpc.aio.Channel.stream_unary`."""
        return self._authenticated(self._channel.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        """See `grpc.aio.Channel.stream_stream`."""
        return self._authenticated(self._channel.stream_stream(*args, **options))

    def _authenticated(self, inner: Any) -> Any:
        return authenticated_multicallable(inner, self._source, self._replay_limit, self._waiting)

    async def close(self, grace: float | None = None) -> None:
        """See `grpc.aio.Channel.close`. The source is left open: it may serve other channels."""
        await self._channel.close(await self._waiting.channel_closes(grace))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See `grpc.aio.Channel.get_state`."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See `grpc.aio.Channel.wait_for_state_change`."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See `grpc.aio.Channel.channel_ready`."""
        await self._channel.channel_ready()

    async def __aenter__(self) -> Self:
        await self._channel.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        await self._waiting.channel_closes(None)
        return await self._channel.__aexit__(kind, error, traceback)

    def __getattr__(self, name: str) -> Any:
        # What gRPC has added to its channels and tools beside it rely on.
        if name == "_channel":
            raise AttributeError(name)
        return getattr(self._channel, name)

    def __repr__(self) -> str:
        return f"<AuthenticatedAioChannel over {self._channel!r}>"


def authenticated_multicallable(
    inner: Any, source: TokenSource, replay_limit: int, waiting: WaitingCalls | None = None
) -> Any:
    """One multicallable, of a channel or of a stub, with tokens."""
    for kind, ours in _KINDS.items():
        if isinstance(inner, kind):
            return ours(inner, source, replay_limit, waiting)
    msg = f"{type(inner).__name__} is no grpc.aio multicallable"
    raise TypeError(msg)


class _MultiCallable:
    def __init__(self, plain: Any, source: TokenSource, replay_limit: int, waiting: WaitingCalls | None) -> None:
        self._plain = self._inner = plain
        self._source = source
        self._waiting = waiting
        self._peek = source.peek
        self._replay_limit = replay_limit
        self._prepare: Callable[[Any], Any] = snapshot
        self._serialize = self._prepare  # `_prepare` without what it does when it fails
        if type(plain).__module__ == "grpc.aio._channel" and not plain._interceptors:  # noqa: SLF001
            # Serialising here and not beneath costs nothing more, and what is replayed is what was sent. Interceptors
            # beneath want to see the message.
            self._serialize = plain._request_serializer or as_it_is  # noqa: SLF001
            self._prepare = functools.partial(prepared, self._serialize)
            self._inner = copy.copy(plain)
            self._inner._request_serializer = None  # noqa: SLF001

    def _start_call(
        self,
        kind: type[AuthenticatedCall],
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> Any:
        if metadata is not None:
            metadata = tuple(metadata)
        if credentials is not None or (metadata and carries_own_authorization(metadata)):
            return self._plain(
                request,
                timeout=timeout,
                metadata=metadata,
                credentials=credentials,
                wait_for_ready=wait_for_ready,
                compression=compression,
            )
        message = self._prepare(request)
        start = functools.partial(_start, self._inner, message, metadata, wait_for_ready, compression)
        call = kind(self._source, start, deadline_of(timeout), None, self._waiting)
        call.begin(self._peek(), timeout)
        return call

    def _start_streaming_call(
        self,
        kind: type[AuthenticatedCall],
        request_iterator: Any,
        timeout: float | None,
        metadata: Any,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> Any:
        if metadata is not None:
            metadata = tuple(metadata)
        if credentials is not None or (metadata and carries_own_authorization(metadata)):
            return self._plain(
                request_iterator,
                timeout=timeout,
                metadata=metadata,
                credentials=credentials,
                wait_for_ready=wait_for_ready,
                compression=compression,
            )
        requests: RequestStream | IteratedRequests
        start: Callable[[Token, float | None], Any]
        if self._prepare is snapshot and request_iterator is not None:
            # Interceptors beneath may wait for the call before they let anybody write to it.
            requests = IteratedRequests(request_iterator, snapshot, self._replay_limit)
            start = functools.partial(_start_iterating, self._inner, requests, metadata, wait_for_ready, compression)
        else:
            requests = RequestStream(request_iterator, self._prepare, self._replay_limit)
            start = functools.partial(_start, self._inner, None, metadata, wait_for_ready, compression)
        call = kind(self._source, start, deadline_of(timeout), requests, self._waiting)
        call.begin(self._peek(), timeout)
        requests.attach(call)
        return call


class UnaryUnary(_MultiCallable, grpc.aio.UnaryUnaryMultiCallable):
    """Unary calls that carry tokens."""

    def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.aio.UnaryUnaryMultiCallable`. Does not wait for a token."""
        token = self._peek()
        if token is None or metadata is not None or credentials is not None:
            return self._start_call(
                UnaryUnaryCall, request, timeout, metadata, credentials, wait_for_ready, compression
            )
        # The hot path: `_start_call` for a fresh token and no metadata of the caller's.
        deadline = None if timeout is None else monotonic() + timeout
        try:
            message = self._serialize(request)
        except Exception:  # noqa: BLE001 - it ends the call
            message = None
            log_unserialisable()
        inner = self._inner
        start = functools.partial(_start, inner, message, None, wait_for_ready, compression)
        call = UnaryUnaryCall(self._source, start, deadline, None, self._waiting)
        attempt = inner(
            message, timeout=timeout, metadata=token.metadata, wait_for_ready=wait_for_ready, compression=compression
        )
        call.adopt(token, attempt)
        return call


class UnaryStream(_MultiCallable, grpc.aio.UnaryStreamMultiCallable):
    """Server streams that carry tokens."""

    def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.aio.UnaryStreamMultiCallable`. Does not wait for a token."""
        return self._start_call(UnaryStreamCall, request, timeout, metadata, credentials, wait_for_ready, compression)


class StreamUnary(_MultiCallable, grpc.aio.StreamUnaryMultiCallable):
    """Client streams that carry tokens."""

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.aio.StreamUnaryMultiCallable`. Does not wait for a token."""
        return self._start_streaming_call(
            StreamUnaryCall, request_iterator, timeout, metadata, credentials, wait_for_ready, compression
        )


class StreamStream(_MultiCallable, grpc.aio.StreamStreamMultiCallable):
    """Bidirectional streams that carry tokens."""

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """See `grpc.aio.StreamStreamMultiCallable`. Does not wait for a token."""
        return self._start_streaming_call(
            StreamStreamCall, request_iterator, timeout, metadata, credentials, wait_for_ready, compression
        )


_KINDS: Final[dict[type, type[_MultiCallable]]] = {
    grpc.aio.UnaryUnaryMultiCallable: UnaryUnary,
    grpc.aio.UnaryStreamMultiCallable: UnaryStream,
    grpc.aio.StreamUnaryMultiCallable: StreamUnary,
    grpc.aio.StreamStreamMultiCallable: StreamStream,
}


def _start(
    inner: Any,
    message: Any,
    metadata: Any,
    wait_for_ready: bool | None,
    compression: grpc.Compression | None,
    token: Token,
    timeout: float | None,
) -> Any:
    carried = (*metadata, *token.metadata) if metadata else token.metadata
    return inner(message, timeout=timeout, metadata=carried, wait_for_ready=wait_for_ready, compression=compression)


def _start_iterating(inner: Any, requests: IteratedRequests, *rest: Any) -> Any:
    return _start(inner, requests.attempt(), *rest)

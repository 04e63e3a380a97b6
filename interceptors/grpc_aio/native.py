"""The adapter for people who compose with `interceptors=[...]` of grpc.aio: the same core, at gRPC's own price."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc.aio import ClientCallDetails

from interceptors.call import REPLAY_LIMIT, Call, Failure, Send, Surface, carries_own_authorization, deadline_of
from interceptors.channels import check_replay_limit, check_source
from interceptors.grpc_aio.call import local_error
from interceptors.grpc_aio.kinds import StreamStreamCall, StreamUnaryCall, UnaryStreamCall, UnaryUnaryCall
from interceptors.grpc_aio.requests import IteratedRequests
from interceptors.messages import as_it_is

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from interceptors.source import TokenSource
    from interceptors.tokens import Token

    Continuation = Callable[[Any, Any], Awaitable[Any]]


def aio_bearer_interceptors(
    source: TokenSource, *, replay_limit: int = REPLAY_LIMIT
) -> list[grpc.aio.ClientInterceptor]:
    """Interceptors that attach tokens, for `grpc.aio.secure_channel(..., interceptors=[..., *these])`.

    Four, since grpc.aio uses an object for one kind of call only, whatever else it implements. Put them last, nearest
    to the wire. Prefer `interceptors.intercept_channel` where nothing else is composed: it costs less, and calls
    behave as plain ones do.

    Args:
        source: Where tokens come from.
        replay_limit: Bytes of a request stream that are kept so that it can be sent again after a refusal.

    Raises:
        TypeError: `source` is no source.
        ValueError: `replay_limit` is negative.
    """
    check_source(source)
    check_replay_limit(replay_limit)
    return [kind(source, replay_limit) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)]


class _Interceptor:
    def __init__(self, source: TokenSource, replay_limit: int) -> None:
        self._source = source
        self._replay_limit = replay_limit

    async def _call(self, kind: Any, continuation: Continuation, details: Any, request: Any) -> Any:
        async def start(token: Token, left: float | None) -> Any:
            return await continuation(_with(details, token, left), request)

        return await self._authenticated(kind, start, details)

    async def _streaming_call(
        self, kind: Any, continuation: Continuation, details: Any, requests: IteratedRequests
    ) -> Any:
        async def start(token: Token, left: float | None) -> Any:
            return await continuation(_with(details, token, left), requests.attempt())

        return await self._authenticated(kind, start, details, requests)

    async def _authenticated(
        self,
        kind: Any,
        start: Callable[[Token, float | None], Awaitable[Any]],
        details: Any,
        requests: IteratedRequests | None = None,
    ) -> Any:
        deadline = deadline_of(details.timeout)
        token, left, call = self._source.peek(), details.timeout, None
        if token is None:
            call = Call(self._source, deadline)
            token, left = _to_send(call.begin(await call.ask_async()))
        try:
            attempt = await start(token, left)
        except grpc.aio.AioRpcError as error:
            # An interceptor nearer to the wire has waited for the end of the attempt.
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            call = call or Call(self._source, deadline)
            if not call.refused(token, replayable=requests is None or requests.rewind()):
                raise
            decision = call.again(await call.ask_async())
            if isinstance(decision, Surface):
                raise error from decision.cause
            token, left = _to_send(decision)
            try:
                attempt = await start(token, left)
            except grpc.aio.AioRpcError as second:
                if second.code() is grpc.StatusCode.UNAUTHENTICATED:
                    call.refused(token)
                raise
        handle = kind(self._source, start, deadline, requests, dealings=call)
        handle.adopt(token, attempt)
        return handle


class _UnaryUnary(_Interceptor, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        details = _with_lasting_metadata(client_call_details)
        if _is_untouched(details):
            return await continuation(details, request)
        return await self._call(UnaryUnaryCall, continuation, details, request)


class _UnaryStream(_Interceptor, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        details = _with_lasting_metadata(client_call_details)
        if _is_untouched(details):
            return await continuation(details, request)
        return await self._call(UnaryStreamCall, continuation, details, request)


class _StreamUnary(_Interceptor, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        details = _with_lasting_metadata(client_call_details)
        if _is_untouched(details):
            return await continuation(details, request_iterator)
        requests = IteratedRequests(request_iterator, as_it_is, self._replay_limit)
        return await self._streaming_call(StreamUnaryCall, continuation, details, requests)


class _StreamStream(_Interceptor, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        details = _with_lasting_metadata(client_call_details)
        if _is_untouched(details):
            return await continuation(details, request_iterator)
        requests = IteratedRequests(request_iterator, as_it_is, self._replay_limit)
        return await self._streaming_call(StreamStreamCall, continuation, details, requests)


def _to_send(decision: Send | Failure) -> tuple[Token, float | None]:
    if isinstance(decision, Failure):
        raise local_error(decision)
    return decision.token, decision.timeout


def _with_lasting_metadata(details: Any) -> Any:
    """`details` with metadata that can be read more than once: a caller may have given an iterator."""
    if details.metadata is None or isinstance(details.metadata, grpc.aio.Metadata):
        return details
    return details._replace(metadata=tuple(details.metadata))


def _is_untouched(details: Any) -> bool:
    return details.credentials is not None or (
        details.metadata is not None and carries_own_authorization(details.metadata)
    )


def _with(details: Any, token: Token, timeout: float | None) -> ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()), *token.metadata)
    return ClientCallDetails(details.method, timeout, metadata, details.credentials, details.wait_for_ready)

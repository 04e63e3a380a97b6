"""The adapter for people who compose with `interceptors=[...]` of grpc.aio: the same core, at gRPC's own price."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc.aio import ClientCallDetails

from interceptors.call import REPLAY_LIMIT, Call, Failure, carries_own_authorization, deadline_of
from interceptors.channels import check_replay_limit, check_source
from interceptors.grpc_aio.call import StreamStreamCall, StreamUnaryCall, UnaryStreamCall, UnaryUnaryCall, local_error
from interceptors.messages import as_it_is, size_of
from interceptors.replay import AsyncReplayableRequests, asynchronous

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from interceptors.source import TokenSource
    from interceptors.tokens import Token


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

    async def _call(
        self, kind: Any, start: Callable[[Token, float | None], Awaitable[Any]], details: Any, requests: Any = None
    ) -> Any:
        deadline = deadline_of(details.timeout)
        token, left = self._source.peek(), details.timeout
        if token is None:
            call = Call(self._source, deadline)
            decision = call.begin(await call.ask_async())
            if isinstance(decision, Failure):
                raise local_error(decision)
            token, left = decision.token, decision.timeout
        handle = kind(self._source, start, deadline, requests)
        handle.adopt(token, await start(token, left))
        return handle


class _UnaryUnary(_Interceptor, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        if _is_untouched(client_call_details):
            return await continuation(client_call_details, request)

        async def start(token: Token, left: float | None) -> Any:
            return await continuation(_with(client_call_details, token, left), request)

        return await self._call(UnaryUnaryCall, start, client_call_details)


class _StreamUnary(_Interceptor, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        if _is_untouched(client_call_details):
            return await continuation(client_call_details, request_iterator)
        requests = _Requests(request_iterator, self._replay_limit)

        async def start(token: Token, left: float | None) -> Any:
            return await continuation(_with(client_call_details, token, left), requests.attempt())

        return await self._call(StreamUnaryCall, start, client_call_details, requests)


class _UnaryStream(_Interceptor, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        if _is_untouched(client_call_details):
            return await continuation(client_call_details, request)

        async def start(token: Token, left: float | None) -> Any:
            return await continuation(_with(client_call_details, token, left), request)

        return await self._call(UnaryStreamCall, start, client_call_details)


class _StreamStream(_Interceptor, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        if _is_untouched(client_call_details):
            return await continuation(client_call_details, request_iterator)
        requests = _Requests(request_iterator, self._replay_limit)

        async def start(token: Token, left: float | None) -> Any:
            return await continuation(_with(client_call_details, token, left), requests.attempt())

        return await self._call(StreamStreamCall, start, client_call_details, requests)


class _Requests:
    """A request stream that gRPC pulls, for attempts that are given an iterator."""

    def __init__(self, requests: Any, limit: int) -> None:
        source = requests.__aiter__() if hasattr(requests, "__aiter__") else asynchronous(requests)
        self._requests: AsyncReplayableRequests[Any, Any] = AsyncReplayableRequests(source, as_it_is, size_of, limit)

    def attempt(self) -> AsyncIterator[Any]:
        return self._requests.attempt()

    def attempt_began(self) -> None:
        """GRPC pulls by itself."""

    def rewind(self) -> bool:
        return self._requests.rewind()

    def free(self) -> None:
        self._requests.free()

    def stop(self) -> None:
        import asyncio

        task = asyncio.ensure_future(self._requests.stop())
        _stopping.add(task)
        task.add_done_callback(_stopping.discard)


_stopping: set[Any] = set()


def _is_untouched(details: Any) -> bool:
    return details.credentials is not None or (
        details.metadata is not None and carries_own_authorization(tuple(details.metadata))
    )


def _with(details: Any, token: Token, timeout: float | None) -> ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()), *token.metadata)
    return ClientCallDetails(details.method, timeout, metadata, details.credentials, details.wait_for_ready)

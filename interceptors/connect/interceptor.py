"""The one object that goes into `interceptors=[...]` of a Connect client, whether that is sync or async."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from interceptors.call import REPLAY_LIMIT
from interceptors.connect import calls_async, calls_sync
from interceptors.messages import as_it_is, size_of
from interceptors.replay import AsyncReplayableRequests, ReplayableRequests, asynchronous
from interceptors.tokens import AUTHORIZATION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from connectrpc.request import RequestContext

    from interceptors.source import TokenSource

REQ = TypeVar("REQ")
RES = TypeVar("RES")


class ConnectBearerInterceptor:
    """Attaches tokens to the calls of any generated Connect client, over every protocol, codec and HTTP version.

        HeartbeatServiceClient("https://api.example.com", interceptors=[ConnectBearerInterceptor(source)])

    Put it last, nearest to the wire, so that the others see one call where it makes two attempts. While an attempt is
    being sent, its token stands in `ctx.request_headers`; afterwards it is taken out again. The address of the client
    should be https: an interceptor cannot see what the transport is.

    Args:
        source: Where tokens come from.
        replay_limit: Bytes of a request stream that are kept so that it can be sent again after a refusal. What is kept
            are the caller's message objects, not what they look like on the wire: one that is changed after it was
            handed over is sent again as it is then.

    Raises:
        TypeError: `source` is no source.
        ValueError: `replay_limit` is negative.
    """

    def __init__(self, source: TokenSource, *, replay_limit: int = REPLAY_LIMIT) -> None:
        from interceptors.channels import check_replay_limit, check_source

        check_source(source)
        check_replay_limit(replay_limit)
        self._source = source
        self._replay_limit = replay_limit

    # Each of the four kinds, sync and async. A caller's own authorization means: not our business.

    def intercept_unary_sync(
        self, call_next: Callable[[REQ, RequestContext[Any, Any]], RES], request: REQ, ctx: RequestContext[Any, Any], /
    ) -> RES:
        """See `connectrpc.interceptor.UnaryInterceptorSync`."""
        if AUTHORIZATION in ctx.request_headers:
            return call_next(request, ctx)
        return calls_sync.single(self._source, call_next, request, ctx, None)

    def intercept_client_stream_sync(
        self,
        call_next: Callable[[Iterator[REQ], RequestContext[Any, Any]], RES],
        request: Iterator[REQ],
        ctx: RequestContext[Any, Any],
        /,
    ) -> RES:
        """See `connectrpc.interceptor.ClientStreamInterceptorSync`."""
        if AUTHORIZATION in ctx.request_headers:
            return call_next(request, ctx)
        return calls_sync.single(self._source, call_next, request, ctx, self._replayable(request))

    def intercept_server_stream_sync(
        self,
        call_next: Callable[[REQ, RequestContext[Any, Any]], Iterator[RES]],
        request: REQ,
        ctx: RequestContext[Any, Any],
        /,
    ) -> Iterator[RES]:
        """See `connectrpc.interceptor.ServerStreamInterceptorSync`."""
        if AUTHORIZATION in ctx.request_headers:
            return call_next(request, ctx)
        return calls_sync.stream(self._source, call_next, request, ctx, None)

    def intercept_bidi_stream_sync(
        self,
        call_next: Callable[[Iterator[REQ], RequestContext[Any, Any]], Iterator[RES]],
        request: Iterator[REQ],
        ctx: RequestContext[Any, Any],
        /,
    ) -> Iterator[RES]:
        """See `connectrpc.interceptor.BidiStreamInterceptorSync`."""
        if AUTHORIZATION in ctx.request_headers:
            return call_next(request, ctx)
        return calls_sync.stream(self._source, call_next, request, ctx, self._replayable(request))

    async def intercept_unary(
        self,
        call_next: Callable[[REQ, RequestContext[Any, Any]], Awaitable[RES]],
        request: REQ,
        ctx: RequestContext[Any, Any],
        /,
    ) -> RES:
        """See `connectrpc.interceptor.UnaryInterceptor`."""
        if AUTHORIZATION in ctx.request_headers:
            return await call_next(request, ctx)
        return await calls_async.single(self._source, call_next, request, ctx, None)

    async def intercept_client_stream(
        self,
        call_next: Callable[[AsyncIterator[REQ], RequestContext[Any, Any]], Awaitable[RES]],
        request: AsyncIterator[REQ],
        ctx: RequestContext[Any, Any],
        /,
    ) -> RES:
        """See `connectrpc.interceptor.ClientStreamInterceptor`."""
        if AUTHORIZATION in ctx.request_headers:
            return await call_next(request, ctx)
        return await calls_async.single(self._source, call_next, request, ctx, self._async_replayable(request))

    def intercept_server_stream(
        self,
        call_next: Callable[[REQ, RequestContext[Any, Any]], AsyncIterator[RES]],
        request: REQ,
        ctx: RequestContext[Any, Any],
        /,
    ) -> AsyncIterator[RES]:
        """See `connectrpc.interceptor.ServerStreamInterceptor`."""
        if AUTHORIZATION in ctx.request_headers:
            return call_next(request, ctx)
        return calls_async.stream(self._source, call_next, request, ctx, None)

    def intercept_bidi_stream(
        self,
        call_next: Callable[[AsyncIterator[REQ], RequestContext[Any, Any]], AsyncIterator[RES]],
        request: AsyncIterator[REQ],
        ctx: RequestContext[Any, Any],
        /,
    ) -> AsyncIterator[RES]:
        """See `connectrpc.interceptor.BidiStreamInterceptor`."""
        if AUTHORIZATION in ctx.request_headers:
            return call_next(request, ctx)
        return calls_async.stream(self._source, call_next, request, ctx, self._async_replayable(request))

    def _replayable(self, requests: Iterator[REQ]) -> ReplayableRequests[REQ, REQ]:
        return ReplayableRequests(iter(requests), as_it_is, size_of, self._replay_limit)

    def _async_replayable(self, requests: Any) -> AsyncReplayableRequests[Any, Any]:
        # A list serves connectrpc as well, although its types do not say so.
        iterator = aiter(requests) if hasattr(requests, "__aiter__") else asynchronous(requests)
        return AsyncReplayableRequests(iterator, as_it_is, size_of, self._replay_limit)

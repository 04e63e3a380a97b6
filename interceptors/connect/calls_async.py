"""An async Connect call with one or two attempts; reads line by line like `calls_sync`."""

from __future__ import annotations

from asyncio import CancelledError
from typing import TYPE_CHECKING, Any, Final, TypeVar

from connectrpc.code import Code
from connectrpc.errors import ConnectError

from interceptors.connect.call import ConnectCall
from interceptors.tokens import AUTHORIZATION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from connectrpc.request import RequestContext

    from interceptors.replay import AsyncReplayableRequests
    from interceptors.source import TokenSource
    from interceptors.tokens import Token

RES = TypeVar("RES")

_END: Final = object()


async def single(
    source: TokenSource,
    call_next: Callable[[Any, RequestContext[Any, Any]], Awaitable[RES]],
    request: Any,
    ctx: RequestContext[Any, Any],
    requests: AsyncReplayableRequests[Any, Any] | None,
) -> RES:
    """Makes a call that has one response. `requests`, if given, are sent instead of `request`."""
    call: ConnectCall | None = None
    headers = ctx.request_headers
    try:
        token = source.peek()
        if token is None:
            call = ConnectCall(source, ctx)
            token = call.first(await _ask(call))
        while True:
            # Set, not added: an attempt carries exactly one.
            headers[AUTHORIZATION] = token.header
            try:
                response = await call_next(request if requests is None else requests.attempt(), ctx)
            except ConnectError as error:
                call = call or ConnectCall(source, ctx)
                if not call.refused(token, error, requests):
                    raise
            else:
                if call is not None:
                    call.passed()
                return response
            finally:
                # Left there, it would show in others' logs, and pass for the caller's own if the call is made again.
                headers.pop(AUTHORIZATION, None)
            token = call.again(await _ask(call))
    finally:
        if requests is not None:
            await requests.stop()


async def stream(
    source: TokenSource,
    call_next: Callable[[Any, RequestContext[Any, Any]], AsyncIterator[RES]],
    request: Any,
    ctx: RequestContext[Any, Any],
    requests: AsyncReplayableRequests[Any, Any] | None,
) -> AsyncIterator[RES]:
    """Makes a call that has a stream of responses; as a plain one, it begins when the first one is asked for."""
    call = ConnectCall(source, ctx)
    headers = ctx.request_headers
    responses: AsyncIterator[RES] | None = None
    try:
        token = source.peek()
        if token is None:
            token = call.first(await _ask(call))
        while True:
            headers[AUTHORIZATION] = token.header
            try:
                responses = aiter(call_next(request if requests is None else requests.attempt(), ctx))
                first: Any = await anext(responses, _END)
                break
            except ConnectError as error:
                if not call.refused(token, error, requests):
                    raise
            finally:
                headers.pop(AUTHORIZATION, None)
            await _close(responses)
            token = call.again(await _ask(call))
        call.passed()
        if first is _END:
            return
        if requests is not None:
            requests.free()
        try:
            yield first
            del first
            async for response in responses:
                yield response
        except ConnectError as error:
            call.ended(token, error)
            raise
    finally:
        try:
            await _close(responses)
        finally:
            if requests is not None:
                await requests.stop()


async def _ask(call: ConnectCall) -> Token | BaseException:
    try:
        return await call.core.ask_async()
    except CancelledError as error:
        # What connectrpc makes of it while an attempt is under way.
        raise ConnectError(Code.CANCELED, "Request was cancelled") from error


async def _close(responses: AsyncIterator[Any] | None) -> None:
    aclose = getattr(responses, "aclose", None)
    if aclose is not None:
        await aclose()

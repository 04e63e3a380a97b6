"""A sync Connect call with one or two attempts; reads line by line like `calls_async`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from connectrpc.errors import ConnectError

from interceptors.connect.call import ConnectCall
from interceptors.tokens import AUTHORIZATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from connectrpc.request import RequestContext

    from interceptors.replay import ReplayableRequests
    from interceptors.source import TokenSource

RES = TypeVar("RES")

_END: Final = object()


def single(
    source: TokenSource,
    call_next: Callable[[Any, RequestContext[Any, Any]], RES],
    request: Any,
    ctx: RequestContext[Any, Any],
    requests: ReplayableRequests[Any, Any] | None,
) -> RES:
    """Makes a call that has one response. `requests`, if given, are sent instead of `request`."""
    call: ConnectCall | None = None
    headers = ctx.request_headers
    try:
        token = source.peek()
        if token is None:
            call = ConnectCall(source, ctx)
            token = call.first(call.core.ask())
        while True:
            # Set, not added: an attempt carries exactly one.
            headers[AUTHORIZATION] = token.header
            try:
                response = call_next(request if requests is None else requests.attempt(), ctx)
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
            token = call.again(call.core.ask())
    finally:
        if requests is not None:
            requests.stop()


def stream(
    source: TokenSource,
    call_next: Callable[[Any, RequestContext[Any, Any]], Iterator[RES]],
    request: Any,
    ctx: RequestContext[Any, Any],
    requests: ReplayableRequests[Any, Any] | None,
) -> Iterator[RES]:
    """Makes a call that has a stream of responses; as a plain one, it begins when the first one is asked for."""
    call = ConnectCall(source, ctx)
    headers = ctx.request_headers
    responses: Iterator[RES] | None = None
    try:
        token = source.peek()
        if token is None:
            token = call.first(call.core.ask())
        while True:
            headers[AUTHORIZATION] = token.header
            try:
                responses = iter(call_next(request if requests is None else requests.attempt(), ctx))
                first: Any = next(responses, _END)
                break
            except ConnectError as error:
                if not call.refused(token, error, requests):
                    raise
            finally:
                headers.pop(AUTHORIZATION, None)
            _close(responses)
            token = call.again(call.core.ask())
        call.passed()
        if first is _END:
            return
        if requests is not None:
            requests.free()
        try:
            yield first
            del first
            yield from responses
        except ConnectError as error:
            call.ended(token, error)
            raise
    finally:
        try:
            _close(responses)
        finally:
            if requests is not None:
                requests.stop()


def _close(responses: Iterator[Any] | None) -> None:
    close = getattr(responses, "close", None)
    if close is not None:
        close()

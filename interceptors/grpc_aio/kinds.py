"""The four kinds of call: what their users do with them besides, by whether requests and responses are streams."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc.aio import AioRpcError

from interceptors.grpc_aio.call import AuthenticatedCall, Ending
from interceptors.grpc_aio.requests import STYLE_ERROR

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Generator

    from interceptors.grpc_aio.requests import IteratedRequests, RequestStream
    from interceptors.tokens import Token


class _UnaryResponse(AuthenticatedCall):
    def __await__(self) -> Generator[Any, None, Any]:
        try:
            attempt = self._attempt
            if attempt is None:
                attempt = yield from self._following(None).__await__()
            while True:
                try:
                    return (yield from attempt.__await__())
                except AioRpcError as error:
                    following = yield from self._following(attempt).__await__()
                    if following is attempt:
                        raise self.final_error(error) from self._cause
                    attempt = following
        except asyncio.CancelledError:
            # Whoever awaits a call and is cancelled cancels the call, as with a plain one.
            self.cancel()
            raise


class _StreamResponse(AuthenticatedCall):
    _iterator: AsyncIterator[Any] | None = None
    _style: str | None = None
    _reading = False
    _unread: deque[Any] | None = None  # what was read ahead of the caller; see `_settle_later`
    _loop: asyncio.AbstractEventLoop

    # A stream that nobody holds any more is cancelled, as gRPC means to do it: so its attempt knows it weakly only. But
    # whoever waits for it, or wants to be called back, need not hold it.

    def _watch(self, attempt: Any) -> None:
        self._loop = asyncio.get_running_loop()
        attempt.add_done_callback(functools.partial(_attempt_of_stream_ended, weakref.ref(self)))

    def _next_change(self) -> asyncio.Future[None]:
        _pinned.add(self)
        return super()._next_change()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        super().add_done_callback(callback)
        if self._callbacks:
            _pinned.add(self)

    def _wake(self) -> None:
        super()._wake()
        if not self._callbacks:
            _pinned.discard(self)

    def _finish(self) -> None:
        super()._finish()
        _pinned.discard(self)

    def __del__(self) -> None:
        if not self._over and self._attempt is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_give_up, self._attempt, self._requests)

    def _use(self, style: str) -> None:
        if self._style not in {None, style}:
            raise grpc.aio.UsageError(STYLE_ERROR)
        self._style = style

    def __aiter__(self) -> AsyncIterator[Any]:
        self._use("iterator")
        if self._iterator is None:
            self._iterator = self._responses()
        return self._iterator

    async def _responses(self) -> AsyncIterator[Any]:
        while (response := await self._next(_iterated)) is not grpc.aio.EOF:
            yield response
            if self._unread is None:
                break
        else:
            return
        # From the first response on, nothing but the final attempt's end can matter.
        attempt = self._attempt
        try:
            async for response in attempt:
                yield response
        except AioRpcError as error:
            await self._following(attempt)
            raise self.final_error(error) from self._cause
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def read(self) -> Any:
        """See `grpc.aio.UnaryStreamCall.read`."""
        if not (self._over and self._attempt is not None):
            self._use("reader")
        return await self._next(_read)

    async def _next(self, read: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """The next response, or EOF."""
        try:
            return await self._next_of_whichever(read)
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def _next_of_whichever(self, read: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        attempt = self._attempt if self._attempt is not None else await self._following(None)
        while True:
            if self._unread is not None:
                attempt = await self._following(attempt)
                if self._unread is not None:
                    return self._next_unread()
            if self._error is not None:
                self._raise_local()
            try:
                self._reading = True
                response = await read(attempt)
            except AioRpcError as error:
                following = await self._following(attempt)
                if following is attempt:
                    raise self.final_error(error) from self._cause
                attempt = following
            else:
                if response is grpc.aio.EOF or self._committed or self._commit(attempt):
                    return response
                attempt = await self._following(attempt)
            finally:
                self._reading = False

    def _next_unread(self) -> Any:
        assert self._unread is not None
        if self._unread:
            return self._unread.popleft()
        if self._status is not None:
            raise self._status from self._cause
        return grpc.aio.EOF

    async def _settle_later(self, attempt: Any) -> None:
        if not self._committed and not self._reading:
            # The server's status comes after its responses, and nobody reads them. They are the caller's if the
            # attempt was the final one.
            self._unread = deque()
            responses = attempt.__aiter__()
            try:
                async for response in responses:
                    self._unread.append(response)
            except AioRpcError:
                pass  # the status is there
            except asyncio.CancelledError:
                if not self._over:
                    raise
        await super()._settle_later(attempt)

    def adopt(self, token: Token, attempt: Any) -> None:
        self._unread = None
        super().adopt(token, attempt)


class _StreamRequest(AuthenticatedCall):
    _requests: RequestStream | IteratedRequests

    async def write(self, request: Any) -> None:
        """See `grpc.aio.StreamUnaryCall.write`."""
        await self._requests.write(request)

    async def done_writing(self) -> None:
        """See `grpc.aio.StreamUnaryCall.done_writing`."""
        await self._requests.done_writing()

    @property
    def _done_writing_flag(self) -> bool:
        # What gRPC's own intercepted calls ask of the call beneath them before they write.
        return self._requests.half_closed


class UnaryUnaryCall(_UnaryResponse, grpc.aio.UnaryUnaryCall):
    """A unary call that is made once more with another token if its first attempt is refused."""

    def adopt(self, token: Token, attempt: Any) -> None:
        # On the hot path: what the others do besides is not for this one.
        self._token = token
        self._attempt = attempt
        attempt.add_done_callback(Ending(self))


class UnaryStreamCall(_StreamResponse, grpc.aio.UnaryStreamCall):
    """A server stream that is made once more with another token if its first attempt is refused."""


class StreamUnaryCall(_StreamRequest, _UnaryResponse, grpc.aio.StreamUnaryCall):
    """A client stream that is made once more with another token if its first attempt is refused."""


class StreamStreamCall(_StreamRequest, _StreamResponse, grpc.aio.StreamStreamCall):
    """A bidirectional stream that is made once more with another token if its first attempt is refused."""


async def _iterated(attempt: Any) -> Any:
    return await anext(attempt.__aiter__(), grpc.aio.EOF)


async def _read(attempt: Any) -> Any:
    return await attempt.read()


# Streams that somebody waits for and nobody need hold.
_pinned: set[AuthenticatedCall] = set()


def _give_up(attempt: Any, requests: RequestStream | IteratedRequests | None) -> None:
    attempt.cancel()
    if requests is not None:
        requests.stop()


def _attempt_of_stream_ended(call_of: weakref.ref[AuthenticatedCall], attempt: Any) -> None:
    call = call_of()
    if call is not None:
        call.attempt_ended(attempt)

"""A request stream over one or two attempts: what was sent so far is kept, and sent again, in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc.aio
from grpc.aio import AioRpcError

from interceptors.messages import size_of
from interceptors.replay import AsyncReplayableRequests, RequestLog, asynchronous, close

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from interceptors.grpc_aio.call import AuthenticatedCall

_log = logging.getLogger("interceptors")

STYLE_ERROR: Final = "The iterator and read/write APIs may not be mixed on a single RPC."
_HALF_CLOSED: Final = 'RPC is half closed after calling "done_writing".'
_FINISHED: Final = "RPC already finished."
_CALL_IS_OVER: Final = (AioRpcError, asyncio.InvalidStateError)


class RequestStream:
    """Pulls from the caller's iterator, or is written to; writes to whichever attempt is the present one.

    Args:
        requests: The caller's iterator, async or plain; None if the caller writes.
        prepare: Turns a request into what is kept and sent.
        limit: The most bytes to keep for a second attempt; see `RequestLog`.
    """

    def __init__(
        self,
        requests: AsyncIterable[Any] | Iterable[Any] | None,
        prepare: Callable[[Any], Any],
        limit: int,
    ) -> None:
        self._requests = requests
        self._prepare = prepare
        self._log: RequestLog[Any] = RequestLog(limit)
        self._call: AuthenticatedCall | None = None
        self._sending = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.half_closed = False

    def attach(self, call: AuthenticatedCall) -> None:
        """Begins to serve `call`."""
        self._call = call
        if self._requests is not None:
            self._run(self._pull(self._requests))

    def attempt_began(self) -> None:
        """A further attempt has taken the place of one that was refused."""
        if self._log.ahead or self.half_closed:
            self._run(self._replay())

    def rewind(self) -> bool:
        """Keeps everything for another attempt; False if not all is there any more."""
        return self._log.rewind()

    def free(self) -> None:
        """No further attempt will be made: the buffer is given back."""
        self._log.free()

    def stop(self) -> None:
        """Ends the pulling of requests: the call is over."""
        for task in list(self._tasks):
            if task is not asyncio.current_task(task.get_loop()):
                task.cancel()

    async def write(self, request: Any) -> None:
        """What the caller writes."""
        if self._requests is not None:
            raise grpc.aio.UsageError(STYLE_ERROR)
        call = self._call
        assert call is not None
        message = self._prepare(request)
        if call.done():
            raise asyncio.InvalidStateError(_FINISHED)
        if self.half_closed:
            raise asyncio.InvalidStateError(_HALF_CLOSED)
        self._log.append(message, size_of(message))
        await self._send()

    async def done_writing(self) -> None:
        """The caller has written all."""
        if self._requests is not None:
            raise grpc.aio.UsageError(STYLE_ERROR)
        await self._done_writing()

    def _run(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pull(self, requests: Any) -> None:
        call = self._call
        assert call is not None
        prepare, append, send = self._prepare, self._log.append, self._send
        try:
            async for request in requests if isinstance(requests, AsyncIterable) else asynchronous(requests):
                message = prepare(request)
                append(message, size_of(message))
                try:
                    await send()
                except _CALL_IS_OVER:
                    await close(requests)
                    return
        except asyncio.CancelledError:
            call.cancel()
            await close(requests)
            raise
        except Exception:  # noqa: BLE001 - as gRPC does it: a caller's iterator that fails cancels its call
            _log.debug("the request iterator has raised an exception", exc_info=True)
            call.cancel()
            return
        try:
            await self._done_writing()
        except _CALL_IS_OVER:
            return

    async def _replay(self) -> None:
        try:
            await self._send()
        except _CALL_IS_OVER:
            return  # it says how

    async def _done_writing(self) -> None:
        call = self._call
        assert call is not None
        if call.done() or self.half_closed:
            return
        self.half_closed = True
        await self._send()

    async def _send(self) -> None:
        """Writes what the present attempt has not been sent yet; returns when it has."""
        call, log = self._call, self._log
        assert call is not None
        while self._sending:
            # Another task is at it; what was appended is written by it, or by this one when it is done.
            await call._next_change()  # noqa: SLF001
        self._sending = True
        try:
            attempt = call._attempt  # noqa: SLF001
            if attempt is None:
                attempt = await call._following(None)  # noqa: SLF001
            while True:
                try:
                    while log.ahead:
                        if attempt is call._ended:  # noqa: SLF001
                            # Its log was rewound: what is taken from it now is for the attempt that follows.
                            raise asyncio.InvalidStateError(_FINISHED)
                        await attempt.write(log.next())
                    if self.half_closed:
                        await attempt.done_writing()
                except _CALL_IS_OVER as error:
                    following = await call._following(attempt)  # noqa: SLF001
                    if following is attempt:
                        raise call.final_error(error) if isinstance(error, AioRpcError) else error
                    attempt = following
                else:
                    if attempt is call._attempt:  # noqa: SLF001
                        return
                    attempt = call._attempt  # noqa: SLF001
        finally:
            self._sending = False
            if call._waiting:  # noqa: SLF001
                call._wake()  # noqa: SLF001


class IteratedRequests:
    """A request stream that whoever makes the attempts pulls by itself, from an iterator for each of them.

    Args:
        requests: The caller's iterator, async or plain.
        prepare: Turns a request into what is kept and sent.
        limit: The most bytes to keep for a second attempt; see `RequestLog`.
    """

    def __init__(self, requests: AsyncIterable[Any] | Iterable[Any], prepare: Callable[[Any], Any], limit: int) -> None:
        iterator = aiter(requests) if isinstance(requests, AsyncIterable) else asynchronous(requests)
        self._requests: AsyncReplayableRequests[Any, Any] = AsyncReplayableRequests(iterator, prepare, size_of, limit)

    def attempt(self) -> AsyncIterator[Any]:
        """What the present attempt is to send."""
        return self._requests.attempt()

    def attach(self, call: AuthenticatedCall) -> None:
        """Nothing: whoever pulls does so by itself."""

    def attempt_began(self) -> None:
        """Nothing, either."""

    @property
    def half_closed(self) -> bool:
        """Whether the caller's iterator has ended."""
        return self._requests.exhausted

    def rewind(self) -> bool:
        """See `RequestStream.rewind`."""
        return self._requests.rewind()

    def free(self) -> None:
        """See `RequestStream.free`."""
        self._requests.free()

    def stop(self) -> None:
        """See `RequestStream.stop`."""
        task = asyncio.ensure_future(self._requests.stop())
        _stopping.add(task)
        task.add_done_callback(_stopping.discard)

    async def write(self, request: Any) -> NoReturn:  # noqa: ARG002 - there is an iterator
        """The two styles do not mix."""
        raise grpc.aio.UsageError(STYLE_ERROR)

    async def done_writing(self) -> NoReturn:
        """See `write`."""
        raise grpc.aio.UsageError(STYLE_ERROR)


_stopping: set[asyncio.Task[None]] = set()

"""A request stream over one or two attempts: what was written so far is kept, and written again, in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING, Any, Final

import grpc.aio
from grpc.aio import AioRpcError

from interceptors.replay import RequestLog, close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from interceptors.grpc_aio.call import AuthenticatedCall

_log = logging.getLogger("interceptors")

_STYLE_ERROR: Final = "The iterator and read/write APIs may not be mixed on a single RPC."
_HALF_CLOSED: Final = 'RPC is half closed after calling "done_writing".'
_FINISHED: Final = "RPC already finished."


class RequestStream:
    """Pulls from the caller's iterator, or is written to; writes to whichever attempt is the present one.

    Args:
        requests: The caller's iterator, async or plain; None if the caller writes.
        prepare: Turns a request into what is kept and sent.
        size: The size in bytes of what `prepare` returns.
        limit: See `RequestLog`.
    """

    def __init__(
        self,
        requests: AsyncIterable[Any] | Iterable[Any] | None,
        prepare: Callable[[Any], Any],
        size: Callable[[Any], int],
        limit: int,
    ) -> None:
        self._requests = requests
        self._prepare = prepare
        self._size = size
        self._log: RequestLog[Any] = RequestLog(limit)
        self._call: AuthenticatedCall | None = None
        self._half_closed = False
        self._sending = False
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, call: AuthenticatedCall) -> None:
        """Begins to serve `call`."""
        self._call = call
        if self._requests is not None:
            self._run(self._pull(self._requests))

    def attempt_began(self) -> None:
        """A further attempt has taken the place of one that was refused."""
        if self._log.ahead or self._half_closed:
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
            raise grpc.aio.UsageError(_STYLE_ERROR)
        call = self._call
        assert call is not None
        message = self._prepare(request)
        if call.done():
            raise asyncio.InvalidStateError(_FINISHED)
        if self._half_closed:
            raise asyncio.InvalidStateError(_HALF_CLOSED)
        self._log.append(message, self._size(message))
        await self._send()

    async def done_writing(self) -> None:
        """The caller has written all."""
        if self._requests is not None:
            raise grpc.aio.UsageError(_STYLE_ERROR)
        await self._done_writing()

    def _run(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pull(self, requests: Any) -> None:
        call = self._call
        assert call is not None
        prepare, append, size, send = self._prepare, self._log.append, self._size, self._send
        try:
            if isinstance(requests, AsyncIterable):
                async for request in requests:
                    message = prepare(request)
                    append(message, size(message))
                    await send()
            else:
                for request in requests:
                    message = prepare(request)
                    append(message, size(message))
                    await send()
            await self._done_writing()
        except (AioRpcError, asyncio.InvalidStateError):
            await close(requests)  # the call is over
        except asyncio.CancelledError:
            call.cancel()
            await close(requests)
            raise
        except Exception:  # noqa: BLE001 - as gRPC does it: a caller's iterator that fails cancels its call
            _log.debug("the request iterator has raised an exception", exc_info=True)
            call.cancel()

    async def _replay(self) -> None:
        try:
            await self._send()
        except (AioRpcError, asyncio.InvalidStateError):
            return  # the call is over, and says how

    async def _done_writing(self) -> None:
        call = self._call
        assert call is not None
        if call.done() or self._half_closed:
            return
        self._half_closed = True
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
                    if self._half_closed:
                        await attempt.done_writing()
                except (AioRpcError, asyncio.InvalidStateError) as error:
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

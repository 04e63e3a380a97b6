"""Replaying a request stream: what was pulled from the caller so far is kept, and sent again, exactly once an attempt.

`RequestLog` holds the messages, without I/O or locks. `ReplayableRequests` and `AsyncReplayableRequests` pull them from
a caller's iterator for libraries that in turn pull from us, maybe on threads or tasks of their own.
"""

from __future__ import annotations

import asyncio
import enum
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

M = TypeVar("M")
R = TypeVar("R")


class _Keeping(enum.Enum):
    ALL = "all"  # a second attempt is possible
    AHEAD = "ahead"  # only what the present attempt has not sent yet


class RequestLog(Generic[M]):
    """The messages of one request stream that may have to be sent, by their position in the stream.

    Args:
        limit: The most bytes to keep for a second attempt; with more the call can no longer be replayed.
    """

    __slots__ = ("_bytes", "_keeping", "_limit", "_messages", "_sent", "_start", "error", "exhausted")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._messages: deque[M] = deque()
        self._start = 0  # the position of the first message that is kept
        self._sent = 0  # the position of the next message that the present attempt sends
        self._bytes = 0
        self._keeping = _Keeping.ALL
        self.exhausted = False
        self.error: BaseException | None = None  # what the caller's iterator raised

    @property
    def replayable(self) -> bool:
        """Whether a second attempt could still send everything again."""
        return self._keeping is _Keeping.ALL

    @property
    def ahead(self) -> bool:
        """Whether there is a message that the present attempt has not sent yet."""
        return self._sent < self._start + len(self._messages)

    def append(self, message: M, size: int) -> None:
        """A message of `size` bytes was pulled."""
        self._messages.append(message)
        if self._keeping is _Keeping.ALL:
            self._bytes += size
            if self._bytes > self._limit:
                self.free()

    def next(self) -> M:
        """The next message for the present attempt; only if `ahead`."""
        message = self._messages[self._sent - self._start]
        self._sent += 1
        if self._keeping is _Keeping.AHEAD:
            self._messages.popleft()
            self._start += 1
        return message

    def free(self) -> None:
        """No further attempt will be made: keep only what the present one has not sent yet."""
        self._keeping = _Keeping.AHEAD
        while self._start < self._sent:
            self._messages.popleft()
            self._start += 1

    def rewind(self) -> bool:
        """Begins a second attempt, which sends everything from the first message; False if that is impossible."""
        if self._keeping is not _Keeping.ALL:
            return False
        self._sent = 0
        self._keeping = _Keeping.AHEAD
        return True


class ReplayableRequests(Generic[R, M]):
    """A caller's request iterator, for attempts that pull from it on threads of their own. Thread-safe.

    The trap it is made for: an attempt can die while its thread is inside the caller's `next()`. The message that this
    call yields later belongs to the next attempt; so only one thread pulls at a time, and what it gets goes to the log.

    Args:
        requests: The caller's iterator.
        prepare: Turns a request into what is kept and sent, and its size in bytes.
        limit: See `RequestLog`.
    """

    def __init__(self, requests: Iterator[R], prepare: Callable[[R], tuple[M, int]], limit: int) -> None:
        self._requests = requests
        self._prepare = prepare
        self._log: RequestLog[M] = RequestLog(limit)
        self._changed = threading.Condition(threading.Lock())
        self._pulling = False
        self._attempt: _Attempt[R, M] | None = None

    def attempt(self) -> Iterator[M]:
        """What the first attempt is to send."""
        self._attempt = _Attempt(self)
        return self._attempt

    def rewind(self) -> bool:
        """Ends the present attempt's iterator and keeps everything for another; False if not all is there any more."""
        with self._changed:
            self._attempt = None
            self._changed.notify_all()
            return self._log.rewind()

    def free(self) -> None:
        """No further attempt will be made: the buffer is given back."""
        with self._changed:
            self._log.free()

    def stop(self) -> None:
        """Ends the pulling of requests: the call is over."""
        with self._changed:
            self._attempt = None
            self._changed.notify_all()

    def _next(self, attempt: _Attempt[R, M]) -> M:
        log = self._log
        while True:
            with self._changed:
                if self._attempt is not attempt:
                    raise StopIteration
                if log.ahead:
                    return log.next()
                if log.error is not None:
                    raise log.error
                if log.exhausted:
                    raise StopIteration
                if self._pulling:
                    self._changed.wait()
                    continue
                self._pulling = True
            self._pull()

    def _pull(self) -> None:
        message: M | None = None
        size = 0
        error: BaseException | None = None
        try:
            message, size = self._prepare(next(self._requests))
        except BaseException as raised:  # noqa: BLE001 - it is raised where the message would have been sent
            error = raised
        with self._changed:
            self._pulling = False
            if error is None:
                self._log.append(message, size)  # type: ignore[arg-type]
            elif isinstance(error, StopIteration):
                self._log.exhausted = True
            else:
                self._log.error = error
            self._changed.notify_all()


class _Attempt(Generic[R, M]):
    __slots__ = ("_requests",)

    def __init__(self, requests: ReplayableRequests[R, M]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[M]:
        return self

    def __next__(self) -> M:
        return self._requests._next(self)  # noqa: SLF001


class AsyncReplayableRequests(Generic[R, M]):
    """`ReplayableRequests` for one event loop: the same names, the same rules.

    An attempt that dies may have its task cancelled while it is inside the caller's `__anext__`; that would end an
    async generator and lose its message, so pulling has a task of its own.

    Args:
        requests: The caller's async iterator.
        prepare: Turns a request into what is kept and sent, and its size in bytes.
        limit: See `RequestLog`.
    """

    def __init__(self, requests: AsyncIterator[R], prepare: Callable[[R], tuple[M, int]], limit: int) -> None:
        self._requests = requests
        self._prepare = prepare
        self._log: RequestLog[M] = RequestLog(limit)
        self._pulling: asyncio.Task[None] | None = None
        self._attempt: _AsyncAttempt[R, M] | None = None

    def attempt(self) -> AsyncIterator[M]:
        """What the first attempt is to send."""
        self._attempt = _AsyncAttempt(self)
        return self._attempt

    def rewind(self) -> bool:
        """Ends the present attempt's iterator and keeps everything for another; False if not all is there any more."""
        self._attempt = None
        return self._log.rewind()

    def free(self) -> None:
        """No further attempt will be made: the buffer is given back."""
        self._log.free()

    async def stop(self) -> None:
        """Ends the pulling of requests, also one that is under way: the call is over."""
        self._attempt = None
        pulling, self._pulling = self._pulling, None
        if pulling is not None and not pulling.done():
            pulling.cancel()
            await asyncio.wait([pulling])

    async def _next(self, attempt: _AsyncAttempt[R, M]) -> M:
        log = self._log
        while True:
            if self._attempt is not attempt:
                raise StopAsyncIteration
            if log.ahead:
                return log.next()
            if log.error is not None:
                raise log.error
            if log.exhausted:
                raise StopAsyncIteration
            if self._pulling is None:
                self._pulling = asyncio.ensure_future(self._pull())
            await asyncio.wait([self._pulling])

    async def _pull(self) -> None:
        try:
            message, size = self._prepare(await anext(self._requests))
        except StopAsyncIteration:
            self._log.exhausted = True
        except BaseException as raised:  # noqa: BLE001 - it is raised where the message would have been sent
            self._log.error = raised
        else:
            self._log.append(message, size)
        finally:
            self._pulling = None


class _AsyncAttempt(Generic[R, M]):
    __slots__ = ("_requests",)

    def __init__(self, requests: AsyncReplayableRequests[R, M]) -> None:
        self._requests = requests

    def __aiter__(self) -> AsyncIterator[M]:
        return self

    async def __anext__(self) -> M:
        return await self._requests._next(self)  # noqa: SLF001


def size_of(message: Any) -> int:
    """How much of a replay limit a message takes: its serialised size in bytes."""
    if isinstance(message, (bytes, bytearray, memoryview)):
        return len(message)
    byte_size = getattr(message, "ByteSize", None)
    return int(byte_size()) if callable(byte_size) else 0

"""Replaying a request stream: what was pulled from the caller so far is kept, and sent again, exactly once an attempt.

`ReplayableRequests` and `AsyncReplayableRequests` pull messages from a caller's iterator for libraries that in turn
pull from us, maybe on threads or tasks of their own. `RequestLog` holds what is to be sent where pulling and sending
are two things; on threads they are one, and what was pulled need only be kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator

# Ordinary iterators end at once; waiting for them leaves no task behind.
_CLOSING_SECONDS: Final = 0.1

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
            # An endless stream of empty messages must not be kept for ever.
            self._bytes += size or 1
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
    call yields later belongs to the next attempt; so only one thread pulls at a time, and what it gets is kept.

    Args:
        requests: The caller's iterator.
        prepare: Turns a request into what is kept and sent.
        size: The size in bytes of what `prepare` returns.
        limit: The most bytes to keep for a second attempt; with more the call can no longer be replayed.
    """

    __slots__ = (
        "_attempt",
        "_changing",
        "_error",
        "_exhausted",
        "_kept",
        "_limit",
        "_prepare",
        "_pulling",
        "_replayable",
        "_requests",
        "_size",
    )

    def __init__(self, requests: Iterator[R], prepare: Callable[[R], M], size: Callable[[M], int], limit: int) -> None:
        self._requests = requests
        self._prepare = prepare
        self._size = size
        self._limit = limit
        self._kept: deque[M] = deque()  # what the second attempt has to send before it pulls
        self._replayable = True
        self._exhausted = False
        self._error: BaseException | None = None  # what the caller's iterator raised
        self._attempt: int | None = 0  # the number of the present attempt; None once the call is over
        self._pulling = threading.Lock()  # held inside the caller's next()
        self._changing = threading.Lock()  # held for moments, while the attempt changes or the buffer is given back

    def attempt(self) -> Iterator[M]:
        """What the present attempt is to send; nothing once the call is over."""
        attempt = self._attempt
        return iter(()) if attempt is None else self._messages(attempt)

    def rewind(self) -> bool:
        """Ends the present attempt's iterator and keeps everything for another; False if not all is there any more."""
        with self._changing:
            if self._attempt is None:
                return False
            self._attempt += 1
            replayable, self._replayable = self._replayable, False
            return replayable

    def free(self) -> None:
        """No further attempt will be made: the buffer is given back."""
        with self._changing:
            if self._replayable:
                self._replayable = False
                self._kept.clear()

    def stop(self) -> None:
        """Ends the pulling of requests: the call is over."""
        with self._changing:
            self._attempt = None
            self._kept = deque()  # an attempt that is still taking from the other one must not find it empty

    def _give_up(self, attempt: int) -> None:
        """More than the limit was pulled; an attempt that has begun meanwhile still has it all."""
        with self._changing:
            if self._attempt == attempt and self._replayable:
                self._replayable = False
                self._kept.clear()

    def _messages(self, attempt: int) -> Iterator[M]:
        kept, requests, prepare, size = self._kept, self._requests, self._prepare, self._size
        # What the attempt before has sent; and what it was about to send, if it was inside next() when it died.
        while self._attempt == attempt:
            if kept:
                yield kept.popleft()
                continue
            with self._pulling:
                if not kept:
                    break
        # While a further attempt is possible, it has to wait for the message that is being pulled. What is pulled is
        # kept before it is looked whether this attempt is still the present one, so the next one misses nothing.
        total = 0
        while self._replayable and self._attempt == attempt:
            with self._pulling:
                if self._attempt != attempt:
                    return
                try:
                    message = prepare(next(requests))
                except StopIteration:
                    self._exhausted = True
                    return
                except BaseException as error:
                    self._error = error
                    raise
                kept.append(message)
                if self._attempt != attempt:
                    return
                # An endless stream of empty messages must not be kept for ever.
                total += size(message) or 1
                if total > self._limit:
                    self._give_up(attempt)
            yield message
        # There will be none, and no earlier one is inside next(): nothing needs to be guarded any more.
        if self._attempt == attempt and self._error is not None:
            raise self._error
        while self._attempt == attempt and not self._exhausted:
            try:
                message = prepare(next(requests))
            except StopIteration:
                return
            yield message


class AsyncReplayableRequests(Generic[R, M]):
    """`ReplayableRequests` for one event loop: the same names, the same rules.

    An attempt that dies may have its task cancelled while it is inside the caller's `__anext__`; that would end an
    async generator and lose its message, so pulling has a task of its own.

    Args:
        requests: The caller's async iterator.
        prepare: Turns a request into what is kept and sent.
        size: The size in bytes of what `prepare` returns.
        limit: See `RequestLog`.
    """

    def __init__(
        self, requests: AsyncIterator[R], prepare: Callable[[R], M], size: Callable[[M], int], limit: int
    ) -> None:
        self._log: RequestLog[M] = RequestLog(limit)
        self._pulling = _Pulling(requests, prepare, size, self._log)
        self._attempt: int | None = 0  # as in ReplayableRequests

    def attempt(self) -> AsyncIterator[M]:
        """What the present attempt is to send; nothing once the call is over."""
        return _AsyncAttempt(self, self._attempt)

    @property
    def exhausted(self) -> bool:
        """Whether the caller's iterator has ended."""
        return self._log.exhausted

    def rewind(self) -> bool:
        """Ends the present attempt's iterator and keeps everything for another; False if not all is there any more."""
        if self._attempt is None:
            return False
        self._attempt += 1
        self._pulling.wake()
        return self._log.rewind()

    def free(self) -> None:
        """No further attempt will be made: the buffer is given back."""
        self._log.free()

    async def stop(self) -> None:
        """Ends the pulling of requests, also one that is under way: the call is over."""
        self._attempt = None
        self._pulling.wake()
        await self._pulling.stop()

    def __del__(self) -> None:
        # A call that was given up without an end.
        self._pulling.abandon()

    async def _next(self, attempt: int | None) -> M:
        log = self._log
        while True:
            if self._attempt is None or self._attempt != attempt:
                raise StopAsyncIteration
            if log.ahead:
                return log.next()
            if log.error is not None:
                raise log.error
            if log.exhausted:
                raise StopAsyncIteration
            await self._pulling.change()


class _AsyncAttempt(Generic[R, M]):
    __slots__ = ("_number", "_requests")

    def __init__(self, requests: AsyncReplayableRequests[R, M], number: int | None) -> None:
        self._requests = requests
        self._number = number

    def __aiter__(self) -> AsyncIterator[M]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, M]:
        return self._requests._next(self._number)  # noqa: SLF001


class _Pulling(Generic[R, M]):
    """The task that pulls: one for the whole stream, as a generator may keep a context or a time limit over its yields.

    It pulls when an attempt wants a message, never ahead. It knows nothing of the attempts, so that they and their call
    are freed when nobody holds them any more.
    """

    def __init__(
        self, requests: AsyncIterator[R], prepare: Callable[[R], M], size: Callable[[M], int], log: RequestLog[M]
    ) -> None:
        self._requests = requests
        self._prepare = prepare
        self._size = size
        self._log = log
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._wanted: asyncio.Future[None] | None = None  # what the task waits for between two messages
        self._waiting: list[asyncio.Future[None]] = []  # what attempts wait for

    def change(self) -> asyncio.Future[None]:
        """Has another message pulled; done when it is there, or when there is something else to be seen."""
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Before the task begins, as an eager one may have its first message by the time it is made.
        self._waiting.append(change)
        if self._task is None:
            self._task = asyncio.ensure_future(self._pull())
        elif self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)
        return change

    def wake(self) -> None:
        """Has whoever waits look again."""
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            if not change.done():
                change.set_result(None)

    async def _pull(self) -> None:
        loop, log = asyncio.get_running_loop(), self._log
        try:
            while True:
                message = self._prepare(await anext(self._requests))
                log.append(message, self._size(message))
                if self._stopped:
                    raise asyncio.CancelledError
                self._wanted = loop.create_future()
                self.wake()
                await self._wanted
        except StopAsyncIteration:
            log.exhausted = True
        except BaseException as error:
            log.error = error  # it is raised where the message would have been sent
            if isinstance(error, asyncio.CancelledError):
                with contextlib.suppress(RuntimeError):  # a generator that does not let itself be closed
                    await close(self._requests)
                raise
        finally:
            self.wake()

    async def stop(self) -> None:
        """Ends the task, whatever it waits for; a caller's iterator that is slow to end does so by itself."""
        self._stopped = True
        task = self._task
        if task is not None and not task.done():
            task.cancel()
            if task is not asyncio.current_task():
                await asyncio.wait([task], timeout=_CLOSING_SECONDS)

    def abandon(self) -> None:
        """Ends the task some time; from any thread, as the garbage collector calls it."""
        task = self._task
        if task is not None and not task.done():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                task.get_loop().call_soon_threadsafe(task.cancel)


async def asynchronous(requests: Iterable[R]) -> AsyncIterator[R]:
    """A plain iterable as an async one."""
    for request in requests:
        yield request


async def close(requests: Any) -> None:
    """Closes an async generator that nothing will be pulled from any more."""
    aclose = getattr(requests, "aclose", None)
    if aclose is not None:
        await aclose()

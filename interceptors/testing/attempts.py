"""What happens to one transmission of a call at the fake server, written once for threads and once for event loops."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator

    from interceptors.testing.services import Services


@dataclass(frozen=True)
class ServedCall:
    """A call that was executed: it got past authentication and ran to its end."""

    method: str
    messages: tuple[Any, ...]
    token: str = field(repr=False)
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    time_remaining: float | None
    at: float

    @property
    def event_ids(self) -> tuple[str, ...]:
        """The ids of the events in the call's messages."""
        return tuple(message.event.event_id for message in self.messages if hasattr(message, "event"))


class Refused(Exception):  # noqa: N818 - it says what happened
    """The call is refused; the message is what the client sees, `code` the name of a status in gRPC."""

    def __init__(self, details: str, code: str = "UNAUTHENTICATED") -> None:
        super().__init__(details)
        self.code = code


@dataclass
class Plan:
    """Refuse one call, once it has received (or, if it streams its answers, sent) so many messages."""

    after_messages: int
    code: str
    details: str
    method: str | None


class Attempt:
    """One transmission of a call, as the server sees it.

    Args:
        services: What is served.
        method: The method's name.
        metadata: What came with the call.
        time_remaining: Seconds until the call's deadline; None if it has none.
    """

    def __init__(
        self, services: Services, method: str, metadata: Iterable[tuple[str, str]], time_remaining: float | None
    ) -> None:
        self._services = services
        self._method = method
        self._metadata = tuple(metadata)
        self._time_remaining = time_remaining
        self._token = ""
        self._messages: list[Any] = []
        self._sent = 0
        self._plan: Plan | None = None
        self._gone = threading.Event()
        services.arrived()

    # For servers that give each call a thread; each raises `Refused`

    def unary(self, request: Any, answer: Callable[[Any], Any]) -> Any:
        """Answers one request."""
        self._begin()
        return self._answer(request, answer)

    def watch(self, request: Any) -> Iterator[Any]:
        """Streams the session's changes."""
        self._begin()
        self._messages.append(request)
        while not request.max_messages or self._sent < request.max_messages:
            # Who wants so many messages gets them at once.
            if self._gone.is_set() or not (
                request.max_messages or self._services.wait_for_change(request.session_id, self._sent, self._gone)
            ):
                return
            yield self._services.session_change(request, self._sent + 1)
            self._one_more_sent()
        self._executed()

    def ingest(self, requests: Iterable[Any]) -> Any:
        """Takes in a stream of events."""
        self._begin()
        for _ in self._all_received(requests):
            pass
        return self._ingested()

    def converse(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Decides on each event of a stream."""
        self._begin()
        for request in self._all_received(requests):
            yield self._services.streamed_decision(request)
        self._executed()

    # The same for servers with an event loop

    async def unary_async(self, request: Any, answer: Callable[[Any], Any]) -> Any:
        """See `unary`."""
        await self._begin_async()
        return self._answer(request, answer)

    async def watch_async(self, request: Any) -> AsyncGenerator[Any]:
        """See `watch`."""
        await self._begin_async()
        self._messages.append(request)
        try:
            while not request.max_messages or self._sent < request.max_messages:
                if not request.max_messages and not await asyncio.to_thread(
                    self._services.wait_for_change, request.session_id, self._sent, self._gone
                ):
                    return
                yield self._services.session_change(request, self._sent + 1)
                self._one_more_sent()
        finally:
            self.hang_up()
        self._executed()

    async def ingest_async(self, requests: AsyncIterator[Any]) -> Any:
        """See `ingest`."""
        await self._begin_async()
        async for request in requests:
            self._received(request)
        return self._ingested()

    async def converse_async(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """See `converse`."""
        await self._begin_async()
        async for request in requests:
            self._received(request)
            yield self._services.streamed_decision(request)
        self._executed()

    def hang_up(self) -> None:
        """The client is gone."""
        self._services.hang_up(self._gone)

    # What they are made of

    def _begin(self) -> None:
        self._services.wait_at_the_door(self._gone)
        self._token, self._plan = self._services.admit(self._method, self._metadata)
        self._check(0)

    async def _begin_async(self) -> None:
        try:
            if self._services.held:
                await asyncio.to_thread(self._services.wait_at_the_door, self._gone)
        except asyncio.CancelledError:
            self.hang_up()
            raise
        self._begin()

    def _answer(self, request: Any, answer: Callable[[Any], Any]) -> Any:
        self._received(request)
        self._executed()
        return answer(request)

    def _one_more_sent(self) -> None:
        self._sent += 1
        self._check(self._sent)

    def _received(self, message: Any) -> None:
        self._messages.append(message)
        self._check(len(self._messages))

    def _all_received(self, requests: Iterable[Any]) -> Iterator[Any]:
        for request in requests:
            self._received(request)
            yield request
        # To a WSGI application, a body that is cut short looks like one that has ended.
        if self._gone.is_set():
            msg = "the client has hung up"
            raise Refused(msg, "CANCELLED")

    def _ingested(self) -> Any:
        self._executed()
        return self._services.ingested(self._messages)

    def _executed(self) -> None:
        messages, metadata = tuple(self._messages), self._metadata
        call = ServedCall(self._method, messages, self._token, metadata, self._time_remaining, time.time())
        self._services.executed(call)

    def _check(self, messages: int) -> None:
        if self._plan is not None and messages >= self._plan.after_messages:
            self._services.refused()
            raise Refused(self._plan.details, self._plan.code)

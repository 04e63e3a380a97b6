"""One thread waits for a token on behalf of everybody who must not block: futures, streams, event loops."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import weakref
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

from interceptors.errors import fresh_copy
from interceptors.forking import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from interceptors.source import TokenSource
    from interceptors.tokens import Token

_LINGER_SECONDS = 5.0


def waiter_of(source: TokenSource) -> TokenWaiter:
    """The one waiter of a source, made when it is first needed."""
    waiter: TokenWaiter | None = source.__dict__.get("_token_waiter")
    if waiter is None:
        # dict.setdefault is atomic: of two threads that come at once, both get the same waiter.
        waiter = source.__dict__.setdefault("_token_waiter", TokenWaiter(source))
    return waiter


class TokenWaiter:
    """Calls `source.token()` on a thread of its own, once for all who wait when it begins.

    Whoever asks while a call is under way is served by the next one: a token is never older than the question, so a
    call that has just rejected a token is not handed the result of a question that was asked before.

    Args:
        source: Where tokens come from.
    """

    def __init__(self, source: TokenSource) -> None:
        self._source = weakref.ref(source)
        self._after_fork_in_child()
        renew_after_fork(self)

    def _after_fork_in_child(self) -> None:
        self._condition = threading.Condition()
        self._waiting: list[tuple[TokenSource, Future[Token]]] = []
        self._running = False

    def request(self, timeout: float | None = None) -> Future[Token]:
        """A future of `source.token()`; it fails with TimeoutError after `timeout` seconds. Never blocks."""
        source = self._source()
        if source is None:
            msg = "the token source is gone"
            raise ReferenceError(msg)
        future: Future[Token] = Future()
        if timeout is not None:
            late = TimeoutError("no token within the time limit")
            alarms.at(time.monotonic() + timeout, lambda: settle(future, late))
        with self._condition:
            if self._running:
                self._condition.notify()
            else:
                threading.Thread(target=self._serve, name="interceptors-token-waiter", daemon=True).start()
                self._running = True
            # The source rides along, so that it lives for as long as somebody waits for it.
            self._waiting.append((source, future))
        return future

    def _serve(self) -> None:
        while True:
            with self._condition:
                if not self._waiting:
                    self._condition.wait(_LINGER_SECONDS)
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._running = False
                    return
            _answer(batch)
            del batch


def _answer(batch: list[tuple[TokenSource, Future[Token]]]) -> None:
    if all(future.done() for _, future in batch):
        return  # nobody waits any more
    answer: Token | BaseException
    try:
        answer = batch[0][0].token()
    except StopIteration as error:
        # A future cannot carry it: what awaits one is a generator.
        answer = RuntimeError("the token source raised StopIteration")
        answer.__cause__ = error
    except BaseException as error:  # noqa: BLE001 - it is handed to those who wait
        answer = error
    for _, future in batch:
        settle(future, answer)


def settle(future: Future[Any], answer: object) -> None:
    """Gives `future` its result or, if `answer` is an exception, its failure; nothing if it was settled before."""
    try:
        if isinstance(answer, BaseException):
            future.set_exception(fresh_copy(answer))
        else:
            future.set_result(answer)
    except InvalidStateError:
        pass


class Alarms:
    """Calls functions at given moments, all on one thread that exists only while any is due."""

    def __init__(self) -> None:
        self._after_fork_in_child()
        renew_after_fork(self)

    def _after_fork_in_child(self) -> None:
        self._condition = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._running = False

    def at(self, when: float, ring: Callable[[], object]) -> None:
        """Calls `ring()` at `when` (seconds of `time.monotonic`); it must neither block nor raise."""
        with self._condition:
            heapq.heappush(self._due, (when, next(self._order), ring))
            if not self._running:
                threading.Thread(target=self._serve, name="interceptors-alarms", daemon=True).start()
                self._running = True
            elif self._due[0][2] is ring:
                self._condition.notify()

    def _serve(self) -> None:
        while True:
            with self._condition:
                if not self._due:
                    self._running = False
                    return
                when, _, ring = self._due[0]
                early = when - time.monotonic()
                if early > 0:
                    self._condition.wait(min(early, threading.TIMEOUT_MAX))
                    continue
                heapq.heappop(self._due)
            ring()


alarms = Alarms()

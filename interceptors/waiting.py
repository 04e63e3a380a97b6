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
_DEAD_ALARMS_AT_LEAST = 64

_lent = threading.local()


def on_lent_thread() -> bool:
    """Whether this thread is one that serves everybody: no user's code may run on it, which might block or end it."""
    return getattr(_lent, "to_all", False)


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
            alarm = alarms.at(time.monotonic() + timeout, lambda: settle(future, late))
            future.add_done_callback(lambda _: alarms.forget(alarm))
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
        _lent.to_all = True
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


class Alarm:
    """What rings, and when; in the order of their times."""

    __slots__ = ("order", "ring", "when")

    def __init__(self, when: float, order: int, ring: Callable[[], object]) -> None:
        self.when = when
        self.order = order
        self.ring: Callable[[], object] | None = ring  # None once it has rung or is forgotten

    def __lt__(self, other: Alarm) -> bool:
        return (self.when, self.order) < (other.when, other.order)


class Alarms:
    """Calls functions at given moments, all on one thread that exists only while any is due."""

    def __init__(self) -> None:
        self._after_fork_in_child()
        renew_after_fork(self)

    def _after_fork_in_child(self) -> None:
        self._condition = threading.Condition()
        self._due: list[Alarm] = []
        self._dead = 0  # how many of them are forgotten
        self._order = itertools.count()
        self._running = False

    def at(self, when: float, ring: Callable[[], object]) -> Alarm:
        """Calls `ring()` at `when` (seconds of `time.monotonic`); it must neither block nor raise."""
        with self._condition:
            alarm = Alarm(when, next(self._order), ring)
            heapq.heappush(self._due, alarm)
            if not self._running:
                threading.Thread(target=self._serve, name="interceptors-alarms", daemon=True).start()
                self._running = True
            elif self._due[0] is alarm:
                self._condition.notify()
            return alarm

    def forget(self, alarm: Alarm) -> None:
        """Does not call it any more, and holds on to nothing that it held."""
        with self._condition:
            if alarm.ring is None:
                return
            alarm.ring = None
            self._dead += 1
            # Calls with long deadlines end early: theirs must not pile up.
            if self._dead > _DEAD_ALARMS_AT_LEAST and self._dead > len(self._due) // 2:
                self._due = [alarm for alarm in self._due if alarm.ring is not None]
                heapq.heapify(self._due)
                self._dead = 0

    def _serve(self) -> None:
        _lent.to_all = True
        while True:
            with self._condition:
                if not self._due:
                    self._running = False
                    return
                alarm = self._due[0]
                early = alarm.when - time.monotonic() if alarm.ring is not None else 0.0
                if early > 0:
                    self._condition.wait(min(early, threading.TIMEOUT_MAX))
                    continue
                heapq.heappop(self._due)
                ring, alarm.ring = alarm.ring, None
                if ring is None:
                    self._dead -= 1
                    continue
            ring()
            del ring, alarm


alarms = Alarms()

"""What the demo's client has asked for, to be held against what the server has executed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import grpc.aio

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from interceptors.testing.attempts import ServedCall


@dataclass(frozen=True)
class Outcome:
    """What became of all calls of one kind; of streams, of each message."""

    kind: str
    sent: int
    once: int
    lost: int
    doubled: int


class Record:
    """Notes each call, thread-safely."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: dict[str, str] = {}
        self._serial = 0
        self._refreshes: list[tuple[float, float]] = []
        self._calls: list[tuple[float, float]] = []
        self.failed = 0
        self.broken = 0
        self.errors: Counter[str] = Counter()
        """How often a call has failed with which error."""

    def new_id(self, kind: str) -> str:
        """An id for a call (or a message of a stream) that is about to be made."""
        with self._lock:
            self._serial += 1
            identifier = f"{kind}-{self._serial}"
            self._sent[identifier] = kind
            return identifier

    def unsent(self, identifier: str) -> None:
        """That one was not handed to the library after all."""
        with self._lock:
            del self._sent[identifier]

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Times one call, and counts it if it fails."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the demo shows how many, whatever they are
            with self._lock:
                self.failed += 1
                self.errors[_in_short(error)] += 1
        finally:
            with self._lock:
                self._calls.append((started, time.monotonic()))

    @contextmanager
    def noting_what_breaks(self, flavour: str) -> Iterator[None]:
        """Notes that a whole session has broken, which is a mistake of the demo's own."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it is shown in the end
            with self._lock:
                self.broken += 1
                self.errors[f"{flavour} broke: {type(error).__name__}: {error}"] += 1

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """Times one refresh."""
        started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._refreshes.append((started, time.monotonic()))

    @property
    def calls(self) -> int:
        """How many calls have ended."""
        return len(self._calls)

    def slowest_during_a_refresh(self) -> float:
        """Seconds that the slowest call took of those that a refresh overlapped."""
        with self._lock:
            return max(
                (
                    ended - started
                    for started, ended in self._calls
                    if any(started < until and since < ended for since, until in self._refreshes)
                ),
                default=0.0,
            )

    def outcome(self, served: Iterable[ServedCall]) -> list[Outcome]:
        """What the server has executed of it."""
        executed: Counter[str] = Counter()
        for call in served:
            for message in call.messages:
                executed[message.event.event_id if hasattr(message, "event") else message.session_id] += 1
        kinds = sorted(set(self._sent.values()))
        outcome = []
        for kind in kinds:
            counts = [executed[identifier] for identifier, of in self._sent.items() if of == kind]
            outcome.append(
                Outcome(kind, len(counts), counts.count(1), counts.count(0), sum(count > 1 for count in counts))
            )
        return outcome


def _in_short(error: Exception) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"

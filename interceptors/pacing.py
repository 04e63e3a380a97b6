"""How often the issuer may be asked again: after failures, and when its tokens do not please a server."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

ON_TRIAL_SECONDS: Final = 60.0
"""A server that refuses every token refuses a new one at once; one that is refused only after this long was good."""

_RETRY_AFTER_AT_MOST: Final = 3600.0


class Backoff:
    """Capped exponential back-off with jitter. Pure: the caller brings the time.

    Args:
        first: Seconds after the first failure; doubled with each further one.
        cap: The most seconds between two attempts, unless the issuer asks for more.
        jitter: Returns a number in [0, 1); each delay is shortened by up to a quarter by it.
    """

    def __init__(self, first: float = 0.25, cap: float = 30.0, jitter: Callable[[], float] = random.random) -> None:
        self._first = first
        self._cap = cap
        self._jitter = jitter
        self._failures = 0
        self._started = 0.0
        self.until = 0.0

    def fail(self, now: float, retry_after: float | None = None) -> None:
        """Notes a failure at `now`; `retry_after` is what the issuer asked for, in seconds."""
        delay = min(self._cap, self._first * 2.0 ** min(self._failures, 30)) * (1 - self._jitter() / 4)
        self._failures += 1
        self._started = now
        self.until = now + max(delay, min(retry_after or 0.0, _RETRY_AFTER_AT_MOST))

    def reset(self) -> None:
        """Notes a success."""
        self._failures = 0
        self._started = self.until = 0.0

    def active(self, now: float) -> bool:
        """Whether it is too early to ask again. A wall clock that was set back does not prolong it."""
        return self._started <= now < self.until


class CoolDown:
    """The time in which rejections no longer force a refresh: doubles from `first` up to `cap` seconds.

    After `cap` quiet seconds it starts afresh; less would never double for a client that calls seldom. Pure: the
    caller brings the time.
    """

    def __init__(self, first: float = 1.0, cap: float = 300.0) -> None:
        self._first = first
        self._cap = cap
        self._seconds = 0.0
        self._started = 0.0
        self._until = 0.0

    def start(self, now: float) -> None:
        """A token that a refusal had forced was refused as well."""
        if self.active(now):
            return
        quiet = now - self._until > self._cap
        self._seconds = self._first if quiet or not self._seconds else min(self._cap, self._seconds * 2)
        self._started = now
        self._until = now + self._seconds

    def reset(self) -> None:
        """A server has accepted such a token."""
        self._seconds = 0.0
        self._started = self._until = 0.0

    def active(self, now: float) -> bool:
        """Whether rejections are ignored now. A wall clock that was set back does not prolong it."""
        return self._started <= now < self._until

"""What every place that keeps a session can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from interceptors.session import Session


class SessionStore(ABC):
    """Keeps one session. Thread-safe.

    A session is saved whole: a reader sees the old one or the new one, also if the writer dies at any point.
    """

    @abstractmethod
    def load(self) -> Session | None:
        """The session, None if there is none.

        Raises:
            StoreError: It cannot be read; the message names the place and the way out.
        """

    @abstractmethod
    def save(self, session: Session) -> None:
        """Keeps `session` instead of what was kept before.

        Raises:
            StoreError: It cannot be written. What was kept before is still there.
        """

    @abstractmethod
    def clear(self) -> None:
        """Forgets the session, if there is one.

        Raises:
            StoreError: It cannot be removed.
        """

    @abstractmethod
    def lock(self, timeout: float | None = None) -> AbstractContextManager[None]:
        """Keeps everybody else who asks for this lock out: threads, processes, and hosts if the store spans them.

        It is held while a session is refreshed, so that a refresh token is presented once (RFC 9700 section 4.14.2).
        `load`, `save` and `clear` work with and without it.

        Args:
            timeout: The longest to wait for it, in seconds; None waits as long as it takes.

        Raises:
            StoreError: It was not to be had in time, or at all.
        """

"""A session in memory: for tests, and for grants that need no login and can always be made again."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from interceptors.errors import StoreError
from interceptors.forking import renew_after_fork
from interceptors.session import Session
from interceptors.stores.base import SessionStore

if TYPE_CHECKING:
    from collections.abc import Iterator


class MemoryStore(SessionStore):
    """Keeps a session for as long as the process lives, and shares it with no other.

    Use `KeyringStore` or `FileStore` for a session that somebody has logged in for.

    Args:
        session: What it holds at first.

    Raises:
        TypeError: `session` is no `Session`.
    """

    def __init__(self, session: Session | None = None) -> None:
        if session is not None:
            check_session(session)
        self._session = session
        self._after_fork_in_child()
        renew_after_fork(self)

    def _after_fork_in_child(self) -> None:
        self._lock = threading.Lock()

    def load(self) -> Session | None:
        """See `SessionStore.load`; never fails."""
        return self._session

    def save(self, session: Session) -> None:
        """See `SessionStore.save`; never fails."""
        check_session(session)
        self._session = session

    def clear(self) -> None:
        """See `SessionStore.clear`; never fails."""
        self._session = None

    @contextmanager
    def lock(self, timeout: float | None = None) -> Iterator[None]:
        """See `SessionStore.lock`: between threads."""
        lock = self._lock
        if not lock.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
            msg = f"the session in {self} was locked by another thread for more than {timeout:g} s"
            raise StoreError(msg)
        try:
            yield
        finally:
            lock.release()

    def __repr__(self) -> str:
        return "MemoryStore()"

    def __str__(self) -> str:
        return "memory"


def check_session(session: object) -> None:
    """Raises TypeError unless `session` is a `Session`."""
    if not isinstance(session, Session):
        msg = f"session must be a Session, not {type(session).__name__}"
        raise TypeError(msg)

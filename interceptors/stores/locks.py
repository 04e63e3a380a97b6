"""Locks between processes, on files: free at once when their holder dies, sound over threads and forks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from interceptors.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def file_lock(path: Path, timeout: float | None, what: str) -> Iterator[None]:
    """Holds the lock file `path`; it stays behind, empty.

    Args:
        path: The lock file; its directory is made, for its owner only, if it does not exist.
        timeout: The longest to wait, in seconds; None waits as long as it takes.
        what: What is locked, for the message of an error.

    Raises:
        StoreError: The lock was not to be had in time, or the file cannot be made.
    """
    import filelock

    # A new object each time: what one believes to hold must not be carried over a fork.
    lock = filelock.FileLock(path, timeout=-1 if timeout is None else max(timeout, 0), mode=0o600, thread_local=False)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire(poll_interval=0.01)
    except filelock.Timeout:
        msg = f"{what} was locked by another process for more than {timeout:g} s (lock file {path}): try again"
        raise StoreError(msg) from None
    except OSError as error:
        msg = f"{what} cannot be locked: the lock file {path} cannot be used ({error.strerror or error})"
        raise StoreError(msg) from error
    except RuntimeError as error:
        # filelock's word for it: who waits is who holds it.
        msg = f"{what} is locked by this very thread, which would wait for ever (lock file {path}): do not nest locks"
        raise StoreError(msg) from error
    try:
        yield
    finally:
        lock.release()

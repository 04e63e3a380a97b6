"""A session in Redis, for fleets on several hosts that share one identity."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from interceptors.errors import LOGIN_HINT, StoreError
from interceptors.forking import renew_after_fork
from interceptors.stores import format as session_format
from interceptors.stores.base import SessionStore
from interceptors.stores.memory import check_session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from interceptors.session import Session

_LOCK_SECONDS: Final = 15.0

# The session and its version are one hash, so that they change together. ARGV: version expected or "", content.
_SAVE: Final = """
local version = redis.call('HGET', KEYS[1], 'version') or '0'
if ARGV[1] ~= '' and ARGV[1] ~= version then return 0 end
redis.call('HSET', KEYS[1], 'version', version + 1, 'session', ARGV[2])
return 1
"""
_CLEAR: Final = """
local version = redis.call('HGET', KEYS[1], 'version')
if not version then return 1 end
redis.call('HDEL', KEYS[1], 'session')
redis.call('HINCRBY', KEYS[1], 'version', 1)
return 1
"""


class RedisStore(SessionStore):
    """Keeps a session in Redis, where all hosts of a fleet see it. Needs the extra "redis".

    Whoever can read the key can use the session: give it a Redis that is yours alone, with a password and TLS.

    The lock is redis-py's. Its holder renews it for as long as it lives; the lock of one that has died is free after
    15 seconds. A holder that was stopped for longer than that, and goes on, finds that it has lost the lock: what it
    saves then is refused if another session was saved meanwhile (fencing).

    Args:
        client: A `redis.Redis`, or anything with its methods.
        key: The key of the session; the lock's is `key:lock`.

    Raises:
        TypeError, ValueError: An argument is not what it should be.
    """

    def __init__(self, client: Any, key: str) -> None:
        if not all(callable(getattr(client, name, None)) for name in ("hget", "eval", "lock")) or _is_async(client):
            msg = f"client must be a redis.Redis (not redis.asyncio), not {type(client).__name__}"
            raise TypeError(msg)
        if not isinstance(key, str):
            msg = f"key must be a str, not {type(key).__name__}"
            raise TypeError(msg)
        if not key:
            msg = "key must not be empty"
            raise ValueError(msg)
        self._client = client
        self._key = key
        self._after_fork_in_child()
        renew_after_fork(self)

    def _after_fork_in_child(self) -> None:
        self._holding = threading.local()  # .version: what this thread, which holds the lock, has last seen

    def load(self) -> Session | None:
        """See `SessionStore.load`."""
        remedy = f"delete the key and {LOGIN_HINT}"
        try:
            with self._errors("read"):
                version, content = self._client.hmget(self._key, ["version", "session"])
        except UnicodeDecodeError:
            # The client decodes. No session that was saved is anything but ASCII.
            return session_format.loads("", str(self), remedy)
        if getattr(self._holding, "version", None) is not None:
            self._holding.version = _text(version) or "0"
        if content is None:
            return None
        return session_format.loads(content, str(self), remedy)

    def save(self, session: Session) -> None:
        """See `SessionStore.save`; under the lock, also refuses to overwrite what was not seen.

        Raises:
            StoreError: As in `SessionStore.save`; or another host has saved a session meanwhile.
        """
        check_session(session)
        expected = getattr(self._holding, "version", None)
        with self._errors("written"):
            saved = self._client.eval(_SAVE, 1, self._key, expected or "", session_format.dumps(session))
        if not saved:
            msg = f"{self} holds another session by now, as the lock was lost: the newer one was left as it is"
            raise StoreError(msg)
        if expected is not None:
            self._holding.version = str(int(expected) + 1)

    def clear(self) -> None:
        """See `SessionStore.clear`."""
        with self._errors("removed"):
            self._client.eval(_CLEAR, 1, self._key)
        if getattr(self._holding, "version", None) is not None:
            self.load()

    @contextmanager
    def lock(self, timeout: float | None = None) -> Iterator[None]:
        """See `SessionStore.lock`: between threads, processes and hosts."""
        with self._errors("locked"):
            lock = self._client.lock(f"{self._key}:lock", timeout=_LOCK_SECONDS, sleep=0.05, thread_local=False)
            got = lock.acquire(blocking_timeout=None if timeout is None else max(timeout, 0))
        if not got:
            msg = f"the session in {self} was locked by another process for more than {timeout:g} s: try again"
            raise StoreError(msg)
        released = threading.Event()
        renewing = threading.Thread(target=_renew, args=(lock, released), name="interceptors-redis-lock", daemon=True)
        with suppress(RuntimeError):  # while the interpreter shuts down, no thread can be started
            renewing.start()
        try:
            with self._errors("read"):
                self._holding.version = _text(self._client.hget(self._key, "version")) or "0"
            yield
        finally:
            self._holding.version = None
            released.set()
            # One that was lost is another's by now; one that cannot be given back ends by itself.
            with suppress(Exception):
                lock.release()

    def __repr__(self) -> str:
        return f"RedisStore({self._key!r})"

    def __str__(self) -> str:
        return f"Redis, key {self._key}"

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        import redis

        try:
            yield
        except redis.RedisError as error:
            msg = (
                f"the session in {self} cannot be {what} ({type(error).__name__}): see that Redis is up and lets you in"
            )
            raise StoreError(msg) from error


def _renew(lock: Any, released: threading.Event) -> None:
    import redis.exceptions

    pause = _LOCK_SECONDS / 3
    while not released.wait(pause):
        try:
            lock.reacquire()
            pause = _LOCK_SECONDS / 3
        except redis.exceptions.LockError:
            return  # it is lost: the fence holds
        except Exception:  # noqa: BLE001 - Redis may be back before the lock ends
            pause = _LOCK_SECONDS / 15


def _is_async(client: object) -> bool:
    return type(client).__module__.startswith("redis.asyncio")


def _text(value: bytes | str | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value

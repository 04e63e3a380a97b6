"""A session in the system's keyring: the Keychain, the Credential Manager, the Secret Service."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeVar

from interceptors.errors import LOGIN_HINT, StoreError
from interceptors.stores import format as session_format
from interceptors.stores.base import SessionStore
from interceptors.stores.locks import file_lock
from interceptors.stores.memory import check_session
from interceptors.timelimit import in_time

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from interceptors.session import Session

T = TypeVar("T")

# Windows' Credential Manager keeps 2,560 bytes of UTF-16 in a secret; the Secret Service is known for more, and each
# secret less is a dozen milliseconds less for which other processes wait.
_LONGEST_SECRET: Final = 1280
_LONGEST_OF_SECRET_SERVICE: Final = 65_536
_LONGEST_BEGINNING: Final = _LONGEST_SECRET - 128
_MOST_PARTS: Final = 10_000
_GENERATIONS: Final = ("a", "b")
_NO_KEYRING: Final = "use FileStore(path), or '--store file' on the command line, on machines without one"


class KeyringStore(SessionStore):
    """Keeps a session in the system's keyring, where only the person who has logged in can read it.

    Every access, also for reading, is made under a lock file, as keyrings do not bear several processes at once, and
    within a time limit, as a locked one may wait for a person for ever; one that is given up keeps the others out until
    it ends, lest it lands after them. Use `FileStore` where there is no keyring.

    Args:
        profile: Which session: one for each issuer, client and account that are used side by side.
        service: The name that the keyring shows.
        timeout: The longest that one access may take, in seconds.

    Raises:
        TypeError, ValueError: An argument is not what it should be.
    """

    def __init__(self, profile: str = "default", *, service: str = "interceptors", timeout: float = 10.0) -> None:
        for name, value in (("profile", profile), ("service", service)):
            if not isinstance(value, str):
                msg = f"{name} must be a str, not {type(value).__name__}"
                raise TypeError(msg)
            if not value or not value.isprintable():
                msg = f"{name} must not be empty and must be printable, it is {value!r}"
                raise ValueError(msg)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            msg = f"timeout must be a number of seconds, not {type(timeout).__name__}"
            raise TypeError(msg)
        if not 0 < timeout < float("inf"):
            msg = f"timeout must be a positive number of seconds, not {timeout}"
            raise ValueError(msg)
        self._profile = profile
        self._service = service
        self._timeout = timeout

    def load(self) -> Session | None:
        """See `SessionStore.load`."""
        content = self._access(self._read)
        return None if content is None else session_format.loads(content, str(self), self._remedy)

    def save(self, session: Session) -> None:
        """See `SessionStore.save`."""
        check_session(session)
        content = session_format.dumps(session)
        self._access(lambda keyring: self._write(keyring, content))

    def clear(self) -> None:
        """See `SessionStore.clear`."""
        self._access(self._remove)

    def lock(self, timeout: float | None = None) -> AbstractContextManager[None]:
        """See `SessionStore.lock`: between threads and processes of this machine, through a file."""
        # The file's name says nothing of whose session it is.
        digest = hashlib.sha256(f"{self._service}\0{self._profile}".encode()).hexdigest()[:16]
        return file_lock(_state_directory() / f"session-{digest}.lock", timeout, f"the session in {self}")

    def __repr__(self) -> str:
        return f"KeyringStore({self._profile!r}, service={self._service!r})"

    def __str__(self) -> str:
        return f"the keyring (service {self._service}, profile {self._profile})"

    @property
    def _remedy(self) -> str:
        return f"run 'interceptors logout', or remove the keyring's entries of {self._service}; then {LOGIN_HINT}"

    # One access at a time, in time

    def _access(self, act: Callable[[_Access], T]) -> T:
        with ExitStack() as locked:
            try:
                locked.enter_context(file_lock(_state_directory() / "keyring.lock", self._timeout, str(self)))
            except StoreError:
                if _Access.latest is not None and _Access.latest.hangs:
                    raise self._no_answer() from None
                raise
            # The thread gives it back, also when left behind: what it still does must not land after what is newer.
            lock = locked.pop_all()
        access = _Access()

        def work() -> T:
            import keyring.errors

            try:
                with lock:
                    return access.run(act)
            except keyring.errors.NoKeyringError:
                msg = f"this machine has no keyring: {_NO_KEYRING}"
                raise StoreError(msg) from None
            except keyring.errors.KeyringLocked:
                msg = f"{self} is locked: unlock it, or {_NO_KEYRING}"
                raise StoreError(msg) from None

        try:
            return in_time(work, self._timeout, "interceptors-keyring")
        except StoreError:
            raise
        except TimeoutError:
            access.given_up = True
            raise self._no_answer() from None
        except Exception as error:
            # No bus, no daemon, a dismissed prompt: each back end has errors of its own.
            why = type(error).__name__
            msg = f"{self} cannot be used ({why}): see that it is running and unlocked, or {_NO_KEYRING}"
            raise StoreError(msg) from error

    def _no_answer(self) -> StoreError:
        return StoreError(
            f"{self} did not answer within {self._timeout:g} s: unlock it, or answer its prompt; or {_NO_KEYRING}"
        )

    # How a session is spread over secrets. The index, written last, holds its beginning and says which parts hold the
    # rest; the parts of the session before are still there until then.

    def _read(self, keyring: _Access) -> str | None:
        text = keyring.get_password(self._service, self._profile)
        index = _parse(text)
        if index is None:
            return None if text is None else str(text).partition("\n")[0]
        parts = [keyring.get_password(self._service, self._part(index.generation, i)) for i in range(index.parts)]
        content = index.beginning + "".join(part or "" for part in parts)
        if hashlib.sha256(content.encode()).hexdigest() != index.digest:
            msg = f"the session in {self} cannot be read, it is damaged: {self._remedy}"
            raise session_format.UnreadableSession(msg)
        return content

    def _write(self, keyring: _Access, content: str) -> None:
        generation, count = _GENERATIONS[0], 0
        if len(content) <= _longest_secret(keyring.backend):
            keyring.set_password(self._service, self._profile, content)
        else:
            present = _parse(keyring.get_password(self._service, self._profile))
            if present is not None and present.generation == generation:
                generation = _GENERATIONS[1]
            rest = content[_LONGEST_BEGINNING:]
            parts = [rest[i : i + _LONGEST_SECRET] for i in range(0, len(rest), _LONGEST_SECRET)]
            for i, part in enumerate(parts):
                keyring.set_password(self._service, self._part(generation, i), part)
            count = len(parts)
            digest = hashlib.sha256(content.encode()).hexdigest()
            index = _Index(generation, count, digest, content[:_LONGEST_BEGINNING])
            keyring.set_password(self._service, self._profile, _text_of(index))
        for each in _GENERATIONS:
            self._remove_parts(keyring, each, count if each == generation else 0)

    def _remove(self, keyring: _Access) -> None:
        if keyring.get_password(self._service, self._profile) is not None:
            keyring.delete_password(self._service, self._profile)
        for generation in _GENERATIONS:
            self._remove_parts(keyring, generation, 0)

    def _remove_parts(self, keyring: _Access, generation: str, first: int) -> None:
        end = first
        while keyring.get_password(self._service, self._part(generation, end)) is not None:
            end += 1
        # From the last one down: whoever dies midway leaves no gap, behind which nobody would look.
        for i in reversed(range(first, end)):
            keyring.delete_password(self._service, self._part(generation, i))

    def _part(self, generation: str, i: int) -> str:
        return f"{self._profile}\t{generation}{i}"


class _Access:
    """The keyring for one access. Once that is given up it ends with the call that hangs, and makes no other."""

    latest: ClassVar[_Access | None] = None  # of this process, where the lock file has them one after another

    def __init__(self) -> None:
        self.given_up = False
        self._ended = False
        _Access.latest = self

    @property
    def hangs(self) -> bool:
        return self.given_up and not self._ended

    def run(self, act: Callable[[_Access], T]) -> T:
        import keyring

        self._keyring = keyring
        try:
            self.backend = keyring.get_keyring()
            _check(self.backend)
            return act(self)
        finally:
            self._ended = True

    def get_password(self, service: str, name: str) -> str | None:
        self._check()
        return self._keyring.get_password(service, name)

    def set_password(self, service: str, name: str, password: str) -> None:
        self._check()
        self._keyring.set_password(service, name, password)

    def delete_password(self, service: str, name: str) -> None:
        self._check()
        self._keyring.delete_password(service, name)

    def _check(self) -> None:
        if self.given_up:
            raise TimeoutError


class _Index(NamedTuple):
    """How a session is spread, and its beginning."""

    generation: str
    parts: int
    digest: str
    beginning: str


def _text_of(index: _Index) -> str:
    head = {"version": session_format.VERSION, "parts": index[:3]}
    return f"{json.dumps(head, separators=(',', ':'))}\n{index.beginning}"


def _parse(text: str | None) -> _Index | None:
    """What an index says; None if it is none but a session itself, or what only `loads` can judge."""
    head, _, beginning = (text or "").partition("\n")
    try:
        document = json.loads(head)
        generation, count, digest = document["parts"]
        if document["version"] != session_format.VERSION or generation not in _GENERATIONS:
            return None
        return _Index(generation, min(count, _MOST_PARTS), str(digest), beginning)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _kind(backend: Any) -> type | None:
    """The class of the keyring that secrets go to; None if there is none."""
    backends = list(getattr(backend, "backends", [backend]))
    return type(backends[0]) if backends else None


def _longest_secret(backend: Any) -> int:
    kind = _kind(backend)
    known = kind is not None and kind.__module__ == "keyring.backends.SecretService"
    return _LONGEST_OF_SECRET_SERVICE if known else _LONGEST_SECRET


def _check(backend: Any) -> None:
    """Raises StoreError if `backend` keeps nothing, or in plain text that nobody has asked for."""
    kind = _kind(backend)
    if kind is None or kind.__module__ in {"keyring.backends.fail", "keyring.backends.null"}:
        msg = f"this machine has no keyring: {_NO_KEYRING}"
        raise StoreError(msg)
    if kind.__name__ == "PlaintextKeyring":
        msg = f"the keyring of this machine keeps secrets in plain text, and not safely: {_NO_KEYRING}"
        raise StoreError(msg)


def _state_directory() -> Path:
    import platformdirs

    return Path(platformdirs.user_state_dir("interceptors"))

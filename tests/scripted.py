"""What a source works with, as scripts: an issuer, a store, and the world of one source with a clock of its own."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from conftest import FakeClock, eventually

from interceptors import RefreshingTokenSource, Session, SessionStore, Token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 20.0
"""Seconds after which a test gives up waiting for what should happen at once."""

SECRET = "s3cr3t"
"""Every scripted token contains it, so that a leak is found by looking for it."""


def a_session(clock: Callable[[], float], number: int = 0, *, lifetime: float | None = 3600.0, **more: Any) -> Session:
    now = clock()
    more.setdefault("refresh_token", f"{SECRET}-refresh-{number}")
    return Session(
        access_token=f"{SECRET}-access-{number}",
        expires_at=None if lifetime is None else now + lifetime,
        issued_at=now,
        id_token=f"{SECRET}-id-{number}",
        issuer="https://issuer.example",
        client_id="tests",
        subject="ada",
        **more,
    )


class ScriptedIssuer:
    """A `refresh` that does what `script` says, one entry a request; without an entry it issues the next session.

    An entry is an exception to raise, a function of the session to call, or whatever else to return.
    `closed_gate()` makes requests wait, so that a test can look at what happens during one.
    """

    def __init__(self, clock: FakeClock, lifetime: float | None = 3600.0) -> None:
        self.clock = clock
        self.lifetime = lifetime
        self.script: deque[Any] = deque()
        self.asked: list[Session | None] = []
        self.issued: list[Session] = []
        self.arrived = threading.Semaphore(0)
        self._gate = threading.Event()
        self._gate.set()

    def __call__(self, session: Session | None) -> Session:
        self.asked.append(session)
        self.arrived.release()
        assert self._gate.wait(PATIENCE), "the gate stayed closed"
        if self.script:
            entry = self.script.popleft()
            if isinstance(entry, BaseException):
                raise entry
            return entry(session) if callable(entry) else entry
        issued = a_session(self.clock, len(self.issued) + 1, lifetime=self.lifetime)
        self.issued.append(issued)
        return issued

    @contextmanager
    def closed_gate(self) -> Iterator[None]:
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def wait_for_request(self) -> None:
        assert self.arrived.acquire(timeout=PATIENCE), "no request came"


class ScriptedStore(SessionStore):
    """A store that remembers what was done, and fails when told: `failing["load"] = StoreError("...")`."""

    def __init__(self, session: Session | None = None) -> None:
        self.session = session
        self.done: list[str] = []
        self.saved: list[Session] = []
        self.failing: dict[str, BaseException] = {}
        self.locked = False
        self._lock = threading.Lock()

    def _note(self, what: str) -> None:
        self.done.append(what)
        if what in self.failing:
            raise self.failing[what]

    def load(self) -> Session | None:
        self._note("load")
        return self.session

    def save(self, session: Session) -> None:
        self._note("save")
        self.saved.append(session)
        self.session = session

    def clear(self) -> None:
        self._note("clear")
        self.session = None

    @contextmanager
    def lock(self, timeout: float | None = None) -> Iterator[None]:
        self._note("lock")
        with self._lock:
            self.locked = True
            yield
            self.locked = False
        self._note("unlock")


class World:
    """One clock, one store, one issuer, and the sources over them, which are closed in the end."""

    def __init__(self, session: Session | str | None = "fresh", lifetime: float | None = 3600.0) -> None:
        self.clock = FakeClock()
        self.issuer = ScriptedIssuer(self.clock, lifetime)
        first = a_session(self.clock, lifetime=lifetime) if isinstance(session, str) else session
        self.store = ScriptedStore(first)
        self.pauses: list[float] = []
        self._sources = ExitStack()

    def source(self, **options: Any) -> RefreshingTokenSource:
        options.setdefault("jitter", lambda: 0.0)
        source = RefreshingTokenSource(self.store, self.issuer, clock=self.clock, **options)
        source._pause = self.pauses.append
        return self._sources.enter_context(source)

    def warm_source(self, **options: Any) -> RefreshingTokenSource:
        """A source that has handed out its first token, and whose thread runs."""
        source = self.source(**options)
        source.token(timeout=PATIENCE)
        return source

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sources.close()


def settled(source: RefreshingTokenSource) -> None:
    """Waits until the source's thread has dealt with all that was asked of it."""
    eventually(lambda: source._nudge_after != float("inf") and source._round is None)


def value(number: int) -> str:
    """The access token of the session with this number."""
    return f"{SECRET}-access-{number}"


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(i)` returned or raised, from `count` threads that begin at the same moment."""
    results: list[Any] = [None] * count
    together = threading.Barrier(count)

    def run(i: int) -> None:
        together.wait(PATIENCE)
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread still waits"
    return results


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Begins `work()` on a thread; the returned function waits for it, and returns or raises what it did."""
    outcome: list[tuple[str, Any]] = []

    def run() -> None:
        try:
            outcome.append(("returned", work()))
        except BaseException as error:
            outcome.append(("raised", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it still waits"
        kind, what = outcome[0]
        if kind == "raised":
            raise what
        return what

    return result


def values(tokens: list[Any]) -> set[Any]:
    """The distinct values of tokens; anything else among them stays what it is."""
    return {token.value if isinstance(token, Token) else token for token in tokens}

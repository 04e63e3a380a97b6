"""The source for sessions that last: refreshes ahead of time, on a thread of its own, once for everybody."""

from __future__ import annotations

import atexit
import logging
import random
import threading
import time
import traceback
import weakref
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Self

from interceptors.errors import LOGIN_HINT, AuthError, LoginRequired, RefreshError, fresh_copy, shows
from interceptors.forking import renew_after_fork
from interceptors.freshness import freshness
from interceptors.pacing import ON_TRIAL_SECONDS, Backoff, CoolDown
from interceptors.session import Session
from interceptors.source import TokenSource
from interceptors.stats import Cause, SourceStats
from interceptors.stores.base import SessionStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from interceptors.tokens import Token

_log = logging.getLogger("interceptors")

_LOCK_SECONDS = 60.0
_LOOK_AGAIN_SECONDS = 1.0
_BRIEFLY_SECONDS = 1.0
_OUTAGE_SECONDS = 300.0
_SAVE_PAUSES = (0.05, 0.1, 0.25, 0.5)
_SAVE_SECONDS = 2.0
_SAVE_AGAIN_SECONDS = 60.0
_CLOSE_SECONDS = 120.0  # the wait for the lock, and then an issuer that answers each of its requests at the last moment

_NEEDS_ITSELF = "refreshing the access token needs that access token itself: refresh and on_refresh must not use it"


# Refreshes in a row whose tokens live for less than it takes to get them.
_TRIES = 3

_NEVER = float("-inf")
_FOREVER = float("inf")


class _Held:
    """The session in use, and the moments at which its token's freshness changes."""

    __slots__ = ("due_at", "expires_at", "fresh_until", "on_trial_until", "refused", "rejected", "session", "token")

    def __init__(self, session: Session, window: float, jitter: float) -> None:
        self.session = session
        self.token = session.token
        self.fresh_until, self.due_at, self.expires_at = freshness(session, window, jitter)
        self.on_trial_until = _NEVER  # a refusal before this moment means that refreshing does not help
        self.rejected = False  # a server has refused it
        self.refused = False  # and it is not to be handed out for that


class _NothingNew(Exception):  # noqa: N818 - no error but a finding
    """What failed before would fail again: it is too early, or pointless until the store changes."""


class _Round:
    """One pass of the source's thread, and what came of it for all who wait for it."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.answer: Token | BaseException | None = None


class RefreshingTokenSource(TokenSource):
    """Keeps a session's access token valid: refreshes it before it expires, and when a server refuses it.

    A fresh token is handed out without a lock and without I/O. Inside the proactive window one background refresh
    runs while callers keep getting the present token; only when it is (almost) expired or refused do they wait, all
    for the same refresh, each no longer than its own deadline. Refreshing happens under the store's lock, so that of
    all processes that share a session one refreshes and the others adopt the result (RFC 9700 section 2.2.2: refresh
    tokens rotate, using an old one revokes the session).

    Args:
        store: Where the session is kept.
        refresh: `Session | None -> Session`; None when the store is empty. Normally `OidcClient(...).refresh`. It
            raises `LoginRequired` when only a login can help; anything else that it raises counts as passing.
        window: How long before its expiry a token is refreshed; at most a quarter of the token's lifetime.
        clock: The wall clock, Unix seconds.
        on_refresh: Called with the new session after each refresh, on the source's thread. It should be quick: callers
            that wait for the refresh wait for it, too.
        jitter: Returns numbers in [0, 1); spreads the refreshes of many clients.

    Raises:
        TypeError, ValueError: An argument is not what it should be; the message says what was expected.
    """

    def __init__(
        self,
        store: SessionStore,
        refresh: Callable[[Session | None], Session],
        *,
        window: timedelta = timedelta(minutes=15),
        clock: Callable[[], float] = time.time,
        on_refresh: Callable[[Session], object] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        _check_arguments(store, refresh, window, clock, on_refresh)
        self._store = store
        self._refresh = refresh
        self._window = window.total_seconds()
        self._clock = clock
        self._on_refresh = on_refresh
        self._jitter = jitter

        self._held: _Held | None = None
        self._seen: Session | None = None  # what the store held when it was last read or written
        # The sessions that could not be saved, the last of which is held. Each may have landed all the same, or still.
        self._unsaved: list[Session] = []
        self._untold: Session | None = None  # on_refresh has not heard of it yet
        self._dead: AuthError | None = None  # remembered until the store changes
        self._failure: AuthError | None = None  # the latest passing failure
        self._backoff = Backoff(jitter=jitter)
        self._saving = Backoff(first=1.0, cap=_SAVE_AGAIN_SECONDS, jitter=jitter)
        self._cool_down = CoolDown()
        self._stats = SourceStats()
        self._closed = False
        self._after_fork_in_child()
        renew_after_fork(self)
        _open_sources.add(self)

    _pause = staticmethod(time.sleep)  # between two attempts to save

    def _after_fork_in_child(self) -> None:
        self._lock = threading.Lock()  # guards state for moments, never held during I/O
        self._jobs: SimpleQueue[_Round | None] = SimpleQueue()
        self._round: _Round | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._nudge_after = _NEVER
        self._untold = None

    # The hot path

    def peek(self) -> Token | None:
        """The present token while it may be sent without waiting, else None; see `TokenSource.peek`."""
        held = self._held
        if held is None:
            return None
        now = self._clock()
        if now < held.fresh_until:
            return held.token
        if now >= held.due_at or held.refused or self._thread is None:
            return None
        self._nudge(now)
        return held.token

    def token(self, *, timeout: float | None = None) -> Token:
        """The present token, or the next one if the present one cannot be sent; see `TokenSource.token`."""
        held = self._held
        if held is not None and self._clock() < held.fresh_until:
            return held.token
        return self._token_when_ready(timeout)

    async def token_async(self, *, timeout: float | None = None) -> Token:  # noqa: ASYNC109 - see `TokenSource`
        """`token` for event loops; see `TokenSource.token_async`."""
        if self._thread is threading.current_thread() and self.peek() is None:
            raise RefreshError(_NEEDS_ITSELF)
        return await super().token_async(timeout=timeout)

    # What servers say

    def reject(self, token: Token) -> None:
        """Makes the next `token()` wait for a refresh, unless refreshing has just proved not to help."""
        held = self._held
        if held is None or held.token.value != token.value or held.refused:
            return
        with self._lock:
            now = self._clock()
            if not held.rejected:
                held.rejected = True
                self._stats = replace(self._stats, rejected=self._stats.rejected + 1)
            if now < held.on_trial_until:
                self._cool_down.start(now)
            held.on_trial_until = _NEVER
            if self._cool_down.active(now):
                if self._thread is not None and not self._closed:
                    # Asking the issuer does not help; perhaps somebody has logged in again.
                    self._nudge(now)
                return
            held.refused = True
            held.fresh_until = _NEVER
            # A round that is under way may still answer with this very token.
            self._round = None

    def accept(self, token: Token) -> None:
        """Notes that a token from a forced refresh has pleased a server: refreshing does help."""
        held = self._held
        if held is None or held.on_trial_until == _NEVER or held.token.value != token.value:
            return
        with self._lock:
            if held.on_trial_until != _NEVER:
                held.on_trial_until = _NEVER
                self._cool_down.reset()

    # For the application

    @property
    def stats(self) -> SourceStats:
        """What this source has done so far."""
        return self._stats

    @property
    def session(self) -> Session | None:
        """The session in use; None before the first token."""
        held = self._held
        return held.session if held else None

    def close(self) -> None:
        """Stops the source's thread. A refresh under way is finished and saved first. May be called twice."""
        self._begin_to_close()
        if self._thread is not threading.current_thread():
            self._wait_until_closed(_CLOSE_SECONDS)

    def _begin_to_close(self) -> None:
        with self._lock:
            self._closed = True
            self._jobs.put(None)

    def _wait_until_closed(self, seconds: float) -> None:
        thread = self._thread
        # Ctrl-C may end the wait; the end of the program then waits again. It could not join the thread again, which
        # CPython 3.11 believes to have ended once a join was interrupted.
        if thread is not None and self._ended.wait(seconds):
            thread.join()
        _open_sources.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RefreshingTokenSource({self._store!r})"

    # Waiting for the source's thread

    def _nudge(self, now: float) -> None:
        if now >= self._nudge_after:
            # A benign race: two callers at once ask twice, and the second round finds nothing to do.
            self._nudge_after = _FOREVER
            self._jobs.put(_Round())

    def _token_when_ready(self, timeout: float | None) -> Token:
        with self._lock:
            now = self._clock()
            held = self._held
            if held is not None and now < held.fresh_until:
                return held.token
            stale = held is not None and now < held.due_at and not held.refused
            if stale or self._patient(now):
                if not self._closed:
                    # Nobody needs to know that no thread is to be had while there is a token.
                    with suppress(RuntimeError):
                        self._start_thread()
                        self._nudge(now)
                return self._token_despite(self._failure, now)
            if self._closed:
                msg = "the token source is closed: keep it open for as long as calls are made with it"
                raise RefreshError(msg)
            if self._thread is threading.current_thread():
                raise RefreshError(_NEEDS_ITSELF)
            ours = self._round
            if ours is None:
                self._start_thread()
                ours = self._round = _Round()
                self._jobs.put(ours)
            # In an outage the next attempt will hardly fare better: each call would wait for a time limit of its own.
            failure = self._failure if now < self._backoff.until + _OUTAGE_SECONDS else None
        patience = threading.TIMEOUT_MAX if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        brief = failure is not None and patience > _BRIEFLY_SECONDS
        if not ours.done.wait(_BRIEFLY_SECONDS if brief else patience):
            if brief:
                return self._token_despite(failure, self._clock())
            msg = f"the access token was not refreshed within {timeout:g} s"
            raise TimeoutError(msg)
        answer = ours.answer
        if isinstance(answer, BaseException):
            raise fresh_copy(answer)
        assert answer is not None
        return answer

    def _patient(self, now: float) -> bool:
        """Whether it is too early to try again after a failure."""
        return self._failure is not None and self._backoff.active(now)

    def _token_despite(self, error: AuthError | None, now: float) -> Token:
        """What callers get while refreshing fails: the present token for as long as it is of any use."""
        held = self._held
        # A server has the last word on a token that it has refused, unless it is known to be the last one.
        if held is not None and now < held.expires_at and not (held.refused and self._dead is not None):
            return held.token
        error = self._dead or error
        assert error is not None
        raise fresh_copy(error)

    def _start_thread(self) -> None:
        if self._thread is None:
            jobs = self._jobs
            source = weakref.ref(self, lambda _: jobs.put(None))
            thread = threading.Thread(
                target=_work, args=(source, jobs, self._ended), name="interceptors-token-source", daemon=True
            )
            thread.start()
            self._thread = thread

    # On the source's thread

    def _seconds_to_next_save(self) -> float | None:
        if not self._unsaved:
            return None
        return min(max(self._saving.until - self._clock(), 0.0), _SAVE_AGAIN_SECONDS)

    def _run(self, ours: _Round) -> None:
        answer: Token | BaseException = RefreshError("refreshing the access token failed unexpectedly")
        try:
            answer = self._next_token_or_error()
            self._tell()
        except BaseException as error:  # noqa: BLE001 - the thread must live on, and nobody wait for ever
            answer = self._as_refresh_error(error)
        finally:
            with self._lock:
                if self._round is ours:
                    self._round = None
            ours.answer = answer
            ours.done.set()

    def _next_token_or_error(self) -> Token | AuthError:
        try:
            token = self._next_token()
        except _NothingNew:
            pass
        except LoginRequired as error:
            self._count(failures=1)
            self._dead = self._without_tokens(error)
            self._failure = None
            self._backoff.reset()
        except AuthError as error:
            self._note_failure(self._without_tokens(error))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the next attempt may succeed
            self._note_failure(self._as_refresh_error(error))
        else:
            self._dead = self._failure = None
            self._backoff.reset()
            self._nudge_after = _NEVER
            return token
        now = self._clock()
        look_again = now + _LOOK_AGAIN_SECONDS
        self._nudge_after = min(look_again, self._backoff.until) if self._patient(now) else look_again
        try:
            return self._token_despite(self._failure, now)
        except AuthError as error:
            return error

    def _note_failure(self, error: AuthError) -> None:
        self._count(failures=1)
        self._failure = error
        self._backoff.fail(self._clock(), error.retry_after if isinstance(error, RefreshError) else None)

    def _next_token(self) -> Token:
        held = self._held
        fresh = held is not None and self._dead is None and self._cause(held) is None
        if held is not None and fresh and not held.rejected:
            return held.token
        patient = fresh or self._patient(self._clock())
        if held is None or self._dead is not None or patient:
            token = self._token_from_elsewhere(patient=patient)
            if token is not None:
                return token
        with self._store.lock(_LOCK_SECONDS):
            return self._refresh_under_lock()

    def _token_from_elsewhere(self, *, patient: bool) -> Token | None:
        """What the store holds, if that helps; `_NothingNew` if it does not, nor would asking the issuer."""
        try:
            stored = self._load()
        except Exception:
            if patient:
                raise _NothingNew from None
            raise
        changed = stored != self._seen
        if stored is not None and (changed or self._held is None) and self._usable(stored):
            return self._adopt(stored)
        if patient or (self._dead is not None and not changed):
            raise _NothingNew
        return None

    def _refresh_under_lock(self, tries: int = _TRIES) -> Token:
        held = self._held
        cause = self._cause(held) or Cause.PROACTIVE
        current = held.session if held else None
        try:
            stored = self._load()
        except Exception:
            if not self._unsaved:
                # Another process may have used the refresh token meanwhile; using it twice ends the session.
                raise
            stored = self._seen
        # What was seen before is not in use if refreshing it failed; then what is in use may be spent.
        known = self._seen if self._unsaved else current
        self._seen = stored
        if stored != known or held is None:
            current = stored
            self._unsaved = []
            if stored is not None and self._usable(stored):
                token = self._adopt(stored)
                if cause is not Cause.PROACTIVE or self._cause(self._held) is None:
                    return token
                # Its last quarter has begun, nobody waits, and the lock is ours.
        if current is not None and not self._ours(current):
            msg = (
                f"the session in {self._store} belongs to client {current.client_id} at {current.issuer} by now: "
                f"{LOGIN_HINT}, or use another profile"
            )
            raise LoginRequired(msg)
        # Whether a login is required is for the issuer to say again: the store has changed.
        self._dead = None
        asked_at = self._clock()
        try:
            session = self._refreshed(current)
        except LoginRequired:
            # A login that did not wait for the lock may have saved another session meanwhile.
            if not self._has_changed():
                raise
            return self._refresh_under_lock(tries)
        self._count(**{cause.value: 1})
        self._save(session)
        held = self._hold(session)
        if cause is Cause.REACTIVE:
            held.on_trial_until = self._clock() + ON_TRIAL_SECONDS
        self._untold = session
        now = self._clock()
        if now < held.fresh_until:
            return held.token
        if max(asked_at, session.issued_at) < held.fresh_until:
            # The token is a good one; it took long to get and to save it.
            if now < held.due_at:
                return held.token
            if tries > 1:
                return self._refresh_under_lock(tries - 1)
        # Else every further call would refresh once more.
        msg = "the issuer's new access token is about to expire: check this machine's clock and the token lifetime"
        raise RefreshError(msg)

    def _load(self) -> Session | None:
        stored = self._store.load()
        if stored in self._unsaved:
            self._seen = stored  # no news, but one of our own that has landed late
        return stored

    def _has_changed(self) -> bool:
        try:
            stored = self._load()
        except Exception:  # noqa: BLE001 - nothing is known to have changed
            return False
        return stored is not None and stored != self._seen

    def _adopt(self, session: Session) -> Token:
        if self._held is not None:
            self._count(adoptions=1)
        self._seen = session
        self._unsaved = []
        return self._hold(session).token

    def _refreshed(self, session: Session | None) -> Session:
        refreshed: object = self._refresh(session)
        if not isinstance(refreshed, Session):
            msg = f"refresh must return a Session, it returned {type(refreshed).__name__}"
            raise RefreshError(msg)
        return refreshed

    def _cause(self, held: _Held | None) -> Cause | None:
        if held is None:
            return Cause.MANDATORY
        if held.refused:
            return Cause.REACTIVE
        now = self._clock()
        if now >= held.due_at:
            return Cause.MANDATORY
        return Cause.PROACTIVE if now >= held.fresh_until else None

    def _ours(self, session: Session) -> bool:
        """Whether it is of the issuer and client that the source has tokens of; others' are not for its servers."""
        held = self._held.session if self._held else session
        pairs = ((session.issuer, held.issuer), (session.client_id, held.client_id))
        return all(not theirs or not ours or theirs == ours for theirs, ours in pairs)

    def _usable(self, session: Session) -> bool:
        if not self._ours(session):
            return False
        held = self._held
        if held is not None and held.rejected and session.access_token == held.token.value:
            return False
        _, due_at, _ = freshness(session, self._window, 0.0)
        return self._clock() < due_at

    def _hold(self, session: Session) -> _Held:
        held = self._held = _Held(session, self._window, self._jitter())
        return held

    def _save(self, session: Session) -> None:
        # As long as the lock is held, nobody presents the refresh token that the store still holds, and that is spent.
        pauses = iter(() if self._unsaved else _SAVE_PAUSES)
        give_up_at = time.monotonic() + _SAVE_SECONDS
        while True:
            try:
                self._store.save(session)
            except BaseException as error:  # noqa: BLE001 - the session must live on whatever the store does
                pause = next(pauses, None)
                if pause is not None and time.monotonic() < give_up_at:
                    self._pause(pause)
                    continue
                if not self._unsaved:
                    _log.warning(
                        "the refreshed session could not be saved and lives in memory only; saving is tried again (%s)",
                        str(error) if isinstance(error, AuthError) else type(error).__name__,
                    )
                self._unsaved.append(session)
                self._saving.fail(self._clock())
            else:
                self._seen = session
                self._unsaved = []
                self._saving.reset()
            return

    def _save_again(self) -> None:
        held = self._held
        if held is None or not self._unsaved:
            return
        try:
            with self._store.lock(_LOCK_SECONDS):
                if self._load() == self._seen:
                    self._save(held.session)
                else:
                    # Somebody has logged in or out meanwhile; theirs is the newer word.
                    self._unsaved = []
        except BaseException as error:  # noqa: BLE001 - as in _save
            _log.debug("the session could not be saved yet: %s", type(error).__name__)
            self._saving.fail(self._clock())

    def _tell(self) -> None:
        session, self._untold = self._untold, None
        if session is None or self._on_refresh is None:
            return
        try:
            self._on_refresh(session)
        except BaseException as error:  # noqa: BLE001 - as in _run
            # Not its text, which may hold what nobody should see.
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error(
                "on_refresh failed with %s; the refreshed session is in use all the same\n%s",
                type(error).__name__,
                where,
            )

    def _as_refresh_error(self, error: BaseException) -> RefreshError:
        # Its text is not ours, and may hold what nobody should see.
        refresh_error = RefreshError(f"refreshing the access token failed with {type(error).__name__}")
        if not self._shows_token(error):
            refresh_error.__cause__ = error
        return refresh_error

    def _without_tokens(self, error: AuthError) -> AuthError:
        """`error` as it may be shown: where it or what led to it holds a token, without that."""
        if self._shows_token(error):
            error.__cause__ = error.__context__ = None
            if self._shows_token(error):
                if isinstance(error, LoginRequired):
                    return LoginRequired(f"the session can no longer be refreshed: {LOGIN_HINT}")
                msg = f"refreshing the access token failed with {type(error).__name__}"
                return RefreshError(msg, retry_after=getattr(error, "retry_after", None))
        return error

    def _shows_token(self, error: BaseException) -> bool:
        sessions = (self._held.session if self._held else None, self._seen)
        return shows(error, (t for s in sessions if s for t in (s.access_token, s.refresh_token, s.id_token)))

    def _count(self, **more: int) -> None:
        with self._lock:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})


_open_sources: weakref.WeakSet[RefreshingTokenSource] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A daemon thread that dies between the issuer's answer and the save would lose the only valid refresh token.
    sources = list(_open_sources)
    for source in sources:
        source._begin_to_close()  # noqa: SLF001
    # All have been told before any is waited for, so that many that hang take no longer than one.
    deadline = time.monotonic() + _CLOSE_SECONDS
    for source in sources:
        source._wait_until_closed(max(deadline - time.monotonic(), 0.0))  # noqa: SLF001


def _work(
    source_of: weakref.ref[RefreshingTokenSource], jobs: SimpleQueue[_Round | None], ended: threading.Event
) -> None:
    """What the source's thread does; it sets `ended` when it is done."""
    try:
        _serve(source_of, jobs)
    finally:
        ended.set()


def _serve(source_of: weakref.ref[RefreshingTokenSource], jobs: SimpleQueue[_Round | None]) -> None:
    """Does what is asked. It holds the source only while it works, so that one left behind is collected."""
    stop = False
    while not stop:
        source = source_of()
        if source is None:
            return
        patience = source._seconds_to_next_save()  # noqa: SLF001
        if patience is None:
            del source  # else it is held until its session is saved
        try:
            job = jobs.get(timeout=patience)
            stop = job is None
        except Empty:
            job = None
        source = source_of()
        if source is None:
            return
        if job is None:
            source._save_again()  # noqa: SLF001
        else:
            source._run(job)  # noqa: SLF001
        del source, job


def _check_arguments(store: object, refresh: object, window: object, clock: object, on_refresh: object) -> None:
    if not isinstance(store, SessionStore):
        msg = f"store must be a SessionStore (KeyringStore, FileStore, MemoryStore, ...), not {type(store).__name__}"
        raise TypeError(msg)
    if not callable(refresh):
        msg = (
            "refresh must be a callable Session | None -> Session, such as OidcClient(...).refresh, "
            f"not {type(refresh).__name__}"
        )
        raise TypeError(msg)
    if not isinstance(window, timedelta):
        msg = f"window must be a datetime.timedelta, such as timedelta(minutes=15), not {type(window).__name__}"
        raise TypeError(msg)
    if window < timedelta(0):
        msg = f"window must not be negative, it is {window}"
        raise ValueError(msg)
    if not callable(clock):
        msg = f"clock must be a callable that returns Unix seconds, such as time.time, not {type(clock).__name__}"
        raise TypeError(msg)
    if on_refresh is not None and not callable(on_refresh):
        msg = f"on_refresh must be a callable that takes the new Session, or None, not {type(on_refresh).__name__}"
        raise TypeError(msg)

"""Where tokens come from: the only thing that a flavour knows about authentication."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from interceptors.errors import AuthError, RefreshError, shows
from interceptors.forking import renew_after_fork
from interceptors.pacing import ON_TRIAL_SECONDS, CoolDown
from interceptors.tokens import Token
from interceptors.waiting import waiter_of

if TYPE_CHECKING:
    from collections.abc import Callable


class TokenSource(ABC):
    """Hands out access tokens. Thread-safe; one source serves all threads and event loops of a process at once.

    Subclasses implement `token`; one that can tell without waiting also implements `peek`, which spares calls the
    way over another thread, and one that can get another token implements `reject`.
    """

    @abstractmethod
    def token(self, *, timeout: float | None = None) -> Token:
        """A token to send now. May wait for a refresh.

        Args:
            timeout: The longest to wait, in seconds; None waits as long as it takes.

        Raises:
            TimeoutError: No token within `timeout`.
            LoginRequired: Only a new login can help.
            RefreshError: The issuer cannot be asked at present.
            StoreError: The session cannot be read or locked at present.
        """

    def peek(self) -> Token | None:
        """A token that may be sent now without waiting, else None. Never blocks, does no I/O, takes no lock."""
        return None

    def reject(self, token: Token) -> None:  # noqa: B027 - a source that cannot do better may ignore it
        """Tells that a server has refused `token`. Never blocks.

        Telling it twice, or after the token was replaced, changes nothing: a thousand calls that were refused with
        the same token cost one refresh.
        """

    def accept(self, token: Token) -> None:  # noqa: B027 - as reject
        """Tells that a call which was refused before got past authentication with `token`. Never blocks.

        So a source can tell a server that refuses every token from one that had good reason to refuse one.
        """

    async def token_async(self, *, timeout: float | None = None) -> Token:  # noqa: ASYNC109 - the contract of `token`
        """`token` for event loops: arguments and errors are the same.

        All tasks that wait at the same time wait for one thread, so that a slow refresh neither blocks the loop nor
        drains its default executor.
        """
        import asyncio

        token = self.peek()
        if token is not None:
            return token
        async with asyncio.timeout(timeout):
            return await asyncio.wrap_future(waiter_of(self).request())


class StaticTokenSource(TokenSource):
    """Always the same token: for tests, and for tokens that outlive the program.

    Use `RefreshingTokenSource` for a token that expires.

    Args:
        token: The token, or its value.

    Raises:
        TypeError, ValueError: `token` is no token; see `Token`.
    """

    def __init__(self, token: Token | str) -> None:
        self._token = token if isinstance(token, Token) else Token(token)

    def token(self, *, timeout: float | None = None) -> Token:  # noqa: ARG002 - it never waits
        """The token."""
        return self._token

    def peek(self) -> Token:
        """The token."""
        return self._token

    def __repr__(self) -> str:
        return f"StaticTokenSource({self._token!r})"


class CallableTokenSource(TokenSource):
    """Adapts `fn(force_refresh) -> str`, the plain form that many applications already have.

    `fn` is called for every call (never by two threads at once), so it should return quickly while its token is
    good: with `False` for the token to send, and with `True` once after a server refused that one. A call with a
    deadline, and every asynchronous one, runs it on another thread.

    Use `RefreshingTokenSource` for tokens that should be refreshed ahead of time, kept, or shared by processes.

    Args:
        fn: Returns the access token. An exception from it becomes a `RefreshError` with that as its `__cause__`,
            unless it shows a token that was handed out; an `AuthError` is passed on.

    Raises:
        TypeError: `fn` cannot be called so.
    """

    def __init__(self, fn: Callable[[bool], str]) -> None:
        given: object = fn
        if not callable(given):
            msg = f"fn must be a callable (force_refresh: bool) -> str, not {type(given).__name__}"
            raise TypeError(msg)
        if not _takes_one_argument(given):
            msg = "fn must take one argument, fn(force_refresh: bool) -> str: True asks for a token other than the last"
            raise TypeError(msg)
        self._fn = fn
        self._latest: Token | None = None
        self._refused: set[str] = set()
        self._forced: Token | None = None  # what `fn(True)` returned, as long as no server has accepted it
        self._on_trial_until = 0.0
        self._cool_down = CoolDown()
        self._after_fork_in_child()
        renew_after_fork(self)

    def _after_fork_in_child(self) -> None:
        self._calling = threading.Lock()
        self._state = threading.Lock()
        self._asking: int | None = None  # the thread that is inside `fn`

    def token(self, *, timeout: float | None = None) -> Token:
        """The token that `fn` returns now; see `TokenSource.token`."""
        self._check_not_inside()
        if timeout is None:
            with self._calling:
                return self._call()
        future = waiter_of(self).request()
        try:
            return future.result(min(timeout, threading.TIMEOUT_MAX))
        finally:
            future.cancel()

    async def token_async(self, *, timeout: float | None = None) -> Token:  # noqa: ASYNC109 - see `TokenSource`
        """`token` for event loops; see `TokenSource.token_async`."""
        self._check_not_inside()
        return await super().token_async(timeout=timeout)

    def _check_not_inside(self) -> None:
        if self._asking == threading.get_ident():
            msg = "the application's token function needs the token that it is to return: it must not use its source"
            raise RefreshError(msg)

    def _call(self) -> Token:
        token = self._ask(force_refresh=False)
        with self._state:
            if token.value not in self._refused:
                self._refused.clear()
                self._latest = token
                return token
        latest = self._latest
        if latest is not None and latest.value not in self._refused:
            # `fn(False)` goes on returning what was refused, but `fn(True)` has yielded a better one.
            return latest
        if self._cool_down.active(time.monotonic()):
            return token
        token = self._ask(force_refresh=True)
        with self._state:
            self._latest = self._forced = token
            self._on_trial_until = time.monotonic() + ON_TRIAL_SECONDS
            # `fn` has vouched for it: else each further call would force a refresh although the server may accept it.
            self._refused.discard(token.value)
        return token

    def _ask(self, *, force_refresh: bool) -> Token:
        self._asking = threading.get_ident()
        failure: RefreshError | None = None
        try:
            value = self._fn(force_refresh)
        except AuthError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, a later attempt may succeed
            failure = RefreshError(f"the application's token function failed with {type(error).__name__}")
            # Its text is not ours, and may hold what nobody should see.
            if not shows(error, {self._latest.value if self._latest else None, *self._refused}):
                failure.__cause__ = error
        finally:
            self._asking = None
        if failure is not None:
            raise failure
        try:
            return Token(value)
        except (TypeError, ValueError) as error:
            msg = f"the application's token function returned no token: {error}"
            raise RefreshError(msg) from None

    def reject(self, token: Token) -> None:
        """Has the next `token()` call `fn(True)`, unless tokens from `fn(True)` are being refused as well."""
        with self._state:
            now = time.monotonic()
            if self._forced is not None and token.value == self._forced.value:
                self._forced = None
                if now < self._on_trial_until:
                    self._cool_down.start(now)
            self._refused.add(token.value)

    def accept(self, token: Token) -> None:
        """Ends the cool-down; see `TokenSource.accept`."""
        with self._state:
            if self._forced is not None and token.value == self._forced.value:
                self._forced = None
                self._cool_down.reset()

    def __repr__(self) -> str:
        return f"CallableTokenSource({getattr(self._fn, '__qualname__', type(self._fn).__name__)})"


def _takes_one_argument(fn: Callable[..., object]) -> bool:
    import inspect

    try:
        inspect.signature(fn).bind(True)  # noqa: FBT003 - as it will be called
    except TypeError:
        return False
    except ValueError:
        return True  # one in C does not say what it takes
    return True

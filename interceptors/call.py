"""The decision core: what one call does with its token. Written once, without I/O; every flavour only drives it.

A call has one or two attempts. Before the first the flavour asks `begin` what to do with the token that it got (or
with the error instead of one); when an attempt was answered UNAUTHENTICATED it tells `refused`, and if that says so,
gets another token and asks `again`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from interceptors.errors import LOGIN_HINT, AuthError, LoginRequired
from interceptors.tokens import AUTHORIZATION, Token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from interceptors.source import TokenSource

_log = logging.getLogger("interceptors")

REPLAY_LIMIT: Final = 256 * 1024
"""Bytes of a request stream that are kept for a second attempt: gRPC's own per-RPC retry buffer."""

DEADLINE_EXCEEDED_DETAILS: Final = "Deadline Exceeded"

_SAYS_NOTHING_OF_THE_TOKEN: Final = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "CANCELED"})


@dataclass(frozen=True, slots=True)
class Send:
    """Transmit the call with this token, in the `timeout` seconds that are left (None: no limit)."""

    token: Token
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Failure:
    """End the call without another transmission. `code` is the name of a status in gRPC and in Connect."""

    code: Literal["UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED"]
    details: str
    cause: BaseException | None


@dataclass(frozen=True, slots=True)
class Surface:
    """Give the caller the server's own UNAUTHENTICATED, with `cause` as its `__cause__`."""

    cause: BaseException | None


class Call:
    """One call's dealings with its source.

    Args:
        source: Where its tokens come from.
        deadline: When the caller's time is up, in seconds of `time.monotonic`; None if never.
    """

    __slots__ = ("_deadline", "_refused", "_source", "_unconfirmed")

    def __init__(self, source: TokenSource, deadline: float | None) -> None:
        self._source = source
        self._deadline = deadline
        self._refused: Token | None = None
        self._unconfirmed: Token | None = None

    def remaining(self) -> float | None:
        """Seconds that are left of the caller's timeout, at least 0; None if there is no limit."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def ask(self) -> Token | BaseException:
        """The source's answer, waited for on this thread."""
        try:
            return self._source.token(timeout=self.remaining())
        except Exception as error:  # noqa: BLE001 - every failure of a source decides how the call ends
            return error

    async def ask_async(self) -> Token | BaseException:
        """The source's answer, waited for by this task."""
        import asyncio

        try:
            return await self._source.token_async(timeout=self.remaining())
        except Exception as error:  # noqa: BLE001 - as in ask
            return error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return error  # something that the source has waited for was cancelled, and not this task

    def begin(self, answer: Token | BaseException) -> Send | Failure:
        """What to do with the source's answer before the first attempt."""
        remaining = self.remaining()
        if remaining == 0.0 or (remaining is not None and isinstance(answer, TimeoutError)):
            return _deadline_exceeded(answer)
        if isinstance(answer, Token):
            # It may come of a refresh that another call's refusal has forced.
            self._unconfirmed = answer
            return Send(answer, remaining)
        return no_token(_as_error(answer))

    def refused(self, token: Token, *, replayable: bool = True) -> bool:
        """An attempt that carried `token` was answered UNAUTHENTICATED. True: get a token and ask `again`."""
        _tell(self._source.reject, token)
        self._unconfirmed = None
        if self._refused is not None or not replayable:
            return False
        self._refused = token
        return True

    def again(self, answer: Token | BaseException) -> Send | Failure | Surface:
        """What to do with the source's answer after a refusal."""
        remaining = self.remaining()
        if remaining == 0.0 or (remaining is not None and isinstance(answer, TimeoutError)):
            return _deadline_exceeded(answer)
        if not isinstance(answer, Token):
            return Surface(_as_error(answer))
        if self._refused is not None and answer.value == self._refused.value:
            return Surface(None)
        self._unconfirmed = answer
        return Send(answer, remaining)

    def ended(self, code: str) -> None:
        """The present attempt has ended with the status `code`, which is not UNAUTHENTICATED."""
        # Whoever cut the connection, or let the time run out, need not have looked at the token.
        if code not in _SAYS_NOTHING_OF_THE_TOKEN:
            self.passed()

    def passed(self) -> None:
        """The present attempt got past authentication: a response came, or an end that says so."""
        if self._unconfirmed is not None:
            _tell(self._source.accept, self._unconfirmed)
            self._unconfirmed = None


def deadline_of(timeout: float | None) -> float | None:
    """The moment, in seconds of `time.monotonic`, at which a call that begins now runs out of `timeout` seconds."""
    return None if timeout is None else time.monotonic() + timeout


def carries_own_authorization(metadata: Iterable[object]) -> bool:
    """Whether a caller passes credentials of its own in (key, value) pairs; such a call is sent untouched."""
    for pair in metadata:
        # Whatever is no pair is for the library to complain about.
        key = pair[0] if isinstance(pair, (tuple, list)) and pair else None
        if isinstance(key, (str, bytes)) and len(key) == len(AUTHORIZATION):
            text = key if isinstance(key, str) else key.decode("latin-1")
            if text.lower() == AUTHORIZATION:
                return True
    return False


def no_token(error: BaseException) -> Failure:
    """How a call fails for which no token can be had."""
    said = str(error) if isinstance(error, AuthError) else f"the token source failed with {type(error).__name__}"
    if isinstance(error, LoginRequired):
        hint = "" if LOGIN_HINT in said else f": {LOGIN_HINT}"
        return Failure("UNAUTHENTICATED", f"{said}{hint}", error)
    hint = "" if LOGIN_HINT in said else f"; if this lasts, {LOGIN_HINT}"
    return Failure("UNAVAILABLE", f"no access token: {said}{hint}", error)


def _tell(hear: Callable[[Token], None], token: Token) -> None:
    try:
        hear(token)
    except Exception as error:  # noqa: BLE001 - a call must end whatever its source does; libraries' threads wait for it
        _log.error("the token source's %s failed with %s", hear.__name__, type(error).__name__)


def _as_error(answer: object) -> BaseException:
    if isinstance(answer, BaseException):
        return answer
    return TypeError(f"the token source's token() must return a Token, not {type(answer).__name__}")


def _deadline_exceeded(answer: Token | BaseException) -> Failure:
    cause = answer if isinstance(answer, BaseException) else None
    return Failure("DEADLINE_EXCEEDED", DEADLINE_EXCEEDED_DETAILS, cause)

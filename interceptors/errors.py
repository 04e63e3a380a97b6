"""What can go wrong on the way to a token: one hierarchy, each class caught for a different reason."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

E = TypeVar("E", bound=BaseException)

LOGIN_HINT: Final = 'run "interceptors login"'

_SHORTEST_SECRET: Final = 8


class AuthError(Exception):
    """No valid token can be had. Catch this to handle every failure of authentication alike."""


class LoginRequired(AuthError):  # noqa: N818 - the name is the message
    """Only a person can help: there is no session, or its refresh token is no longer accepted.

    The message says how to log in. Retrying without a new login is pointless.
    """


class RefreshError(AuthError):
    """The issuer could not be asked or gave no usable answer; a later attempt may succeed.

    Args:
        message: What happened and what to do.
        retry_after: Seconds that the issuer asked to wait (`Retry-After`, RFC 9110 section 10.2.3), None if it did not.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoreError(AuthError):
    """The place that keeps the session cannot be read, written or locked; the message names it and the way out."""


def fresh_copy(error: E) -> E:
    """A copy of `error` to raise in one of several threads, since raising changes an exception's traceback."""
    try:
        duplicate = copy.copy(error)
        # Copying calls the class with `args`, which some build from other arguments.
        alike = (duplicate.args, str(duplicate)) == (error.args, str(error))
    except Exception:  # noqa: BLE001 - not every class that an application raises can be copied
        return error
    if not alike:
        return error
    duplicate.__cause__ = error.__cause__
    duplicate.__suppress_context__ = error.__suppress_context__
    return duplicate.with_traceback(None)


def shows(error: BaseException, secrets: Iterable[str | None]) -> bool:
    """Whether the text of `error`, or of anything that its traceback tells of, holds one of `secrets`."""
    long_enough = [secret for secret in secrets if secret and len(secret) >= _SHORTEST_SECRET]
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        try:
            text = f"{each!s} {each!r} {getattr(each, '__notes__', '')}"
        except Exception:  # noqa: BLE001 - what cannot be looked at is better not shown
            return True
        if any(secret in text for secret in long_enough):
            return True
        left += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions
    return False

"""What an issuer's answers say, believed only where it is safe to: a refusal, or a new session."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final, TypeVar

from interceptors.errors import RefreshError
from interceptors.session import Session
from interceptors.tokens import check_b64token

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

_ERROR_CODE: Final = re.compile(r"[a-z_]{1,64}")
# RFC 6749 appendix A: VSCHAR and the space of a scope.
_PRINTABLE: Final = re.compile(r"[\x20-\x7e]*")
PASSING: Final = frozenset({"temporarily_unavailable", "server_error"})


class Refused(RefreshError):  # noqa: N818 - it says what happened
    """The issuer has answered with an OAuth error (RFC 6749 section 5.2), whose code is `error`."""

    def __init__(self, message: str, *, error: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.error = error
        self.passing = error in PASSING


def refusal(issuer: str, client_id: str, error: str, retry_after: float | None) -> Refused:
    """The error that an issuer has answered with; the code `error` is shown only if it is one."""
    error = error_code(error)
    what_to_do = (
        "try again later"
        if error in PASSING
        else f"check how the client {client_id!r} is registered there, its secret and its scopes"
    )
    return Refused(f"{issuer} refused the request ({error}): {what_to_do}", error=error, retry_after=retry_after)


def error_code(value: object) -> str:
    """An OAuth error code that may be shown: an issuer could put anything there, a token too."""
    return value if isinstance(value, str) and _ERROR_CODE.fullmatch(value) else "an unknown error"


def unusable(issuer: str, why: str) -> RefreshError:
    """The error that an answer makes no sense."""
    return RefreshError(f"the answer from {issuer} is not usable: {why}")


def session_from(
    answer: Mapping[str, Any],
    *,
    issuer: str,
    client_id: str,
    scope: str | None,
    issued_at: float,
    before: Session | None,
    claims_of: Callable[[str | None], Mapping[str, Any] | None],
) -> Session:
    """The session that a token endpoint's answer yields (RFC 6749 section 5.1).

    Args:
        answer: What the endpoint has said.
        issuer: Who said it.
        client_id: To whom.
        scope: What was asked for.
        issued_at: Unix seconds from before the request.
        before: The session that was refreshed; what the answer leaves out stays as it was there.
        claims_of: Checks an id token (None: there is none), and returns its claims; None if nothing is known of it.

    Raises:
        RefreshError: The answer makes no sense, or `claims_of` said so.
    """
    token_type = answer.get("token_type")
    if not isinstance(token_type, str) or token_type.lower() != "bearer":
        raise unusable(issuer, "its token_type is not Bearer")
    try:
        check_b64token(answer.get("access_token"), "the access token")
    except (TypeError, ValueError) as error:
        raise unusable(issuer, str(error)) from None
    refresh_token, id_token = (printable(answer, key, issuer) for key in ("refresh_token", "id_token"))
    # Not worth a session, whose old refresh token is spent by now: what makes no sense counts as not said.
    granted, expires_in = if_sensible(printable, answer, "scope"), if_sensible(seconds, answer, "expires_in")
    identity = {name: getattr(before, name) if before else None for name in ("subject", "name", "email")}
    claims = claims_of(id_token)
    if claims is None:
        id_token = None
    else:
        identity["subject"] = claims["sub"]
        identity |= {name: claims[name] for name in ("name", "email") if isinstance(claims.get(name), str)}
    return Session(
        access_token=answer["access_token"],
        expires_at=None if expires_in is None else issued_at + expires_in,
        issued_at=issued_at,
        refresh_token=refresh_token or (before.refresh_token if before else None),
        id_token=id_token or (before.id_token if before else None),
        scope=granted or (before.scope if before else scope),
        issuer=issuer,
        client_id=client_id,
        **identity,
    )


def if_sensible(read: Callable[[Mapping[str, Any], str, str], T], answer: Mapping[str, Any], key: str) -> T | None:
    """What `read` finds in `answer` for `key`; None also if it makes no sense."""
    try:
        return read(answer, key, "")
    except RefreshError:
        return None


def printable(answer: Mapping[str, Any], key: str, issuer: str) -> str | None:
    """The text that `answer` has for `key`, None if it has none; it may be sent and shown.

    Raises:
        RefreshError: It is no text, or holds characters that it must not.
    """
    value = answer.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not _PRINTABLE.fullmatch(value):
        why = f"its {key} is no printable ASCII string"
        raise unusable(issuer, why)
    return value or None


def seconds(answer: Mapping[str, Any], key: str, issuer: str) -> float | None:
    """The number of seconds that `answer` has for `key`, None if it has none. Some issuers send it as a string.

    Raises:
        RefreshError: It is no such number.
    """
    value = answer.get(key)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        why = f"its {key} is no number of seconds"
        raise unusable(issuer, why)
    return number

"""The device flow (RFC 8628): a person approves on any other device, while this one keeps asking whether they have."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from interceptors.errors import LOGIN_HINT, LoginRequired
from interceptors.oidc import http
from interceptors.oidc.answers import Refused, if_sensible, printable, seconds, unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"

_INTERVAL_SECONDS: Final = 5.0  # RFC 8628 section 3.2, where the issuer names none
_SLOW_DOWN_SECONDS: Final = 5.0  # section 3.5
_LIFETIME_SECONDS: Final = 600.0  # where the issuer names none, though it must


@dataclass(frozen=True)
class DeviceLogin:
    """What to tell the person who logs in.

    Args:
        verification_uri: Where to go, in any browser.
        user_code: What to enter there.
        verification_uri_complete: An address that has the code in it, for a link or a QR code; None if there is none.
        expires_in: Seconds that the code is good for.
    """

    verification_uri: str
    user_code: str
    verification_uri_complete: str | None
    expires_in: float


@dataclass(frozen=True)
class DeviceAuthorization:
    """A device login that has begun: what the person is told, and what is ours alone."""

    login: DeviceLogin
    device_code: str
    interval: float


def device_authorization_from(answer: Mapping[str, Any], issuer: str) -> DeviceAuthorization:
    """The device login that an issuer's answer begins (RFC 8628 section 3.2).

    Raises:
        RefreshError: The answer makes no sense.
    """
    device_code, user_code = (printable(answer, key, issuer) for key in ("device_code", "user_code"))
    if device_code is None or user_code is None:
        raise unusable(issuer, "it has no device_code or no user_code")
    # Google calls it by the name that it had in a draft.
    verification_uri = printable(answer, "verification_uri", issuer) or printable(answer, "verification_url", issuer)
    complete = if_sensible(printable, answer, "verification_uri_complete")
    # A person will open these: not just any scheme.
    if not http.is_secure(verification_uri):
        raise unusable(issuer, "its verification_uri is no https URL (http on loopback)")
    assert verification_uri is not None
    expires_in = seconds(answer, "expires_in", issuer)
    return DeviceAuthorization(
        DeviceLogin(
            verification_uri,
            user_code,
            complete if http.is_secure(complete) else None,
            _LIFETIME_SECONDS if expires_in is None else expires_in,
        ),
        device_code,
        seconds(answer, "interval", issuer) or _INTERVAL_SECONDS,
    )


def poll(
    ask: Callable[[], T],
    *,
    interval: float,
    expires_in: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """What `ask` returns once the person has approved.

    Args:
        ask: Asks the issuer; raises `Refused` while it has no answer.
        interval: Seconds between two questions; more when the issuer asks for it, or cannot be reached.
        expires_in: Seconds after which asking is pointless.
        clock: Seconds, steadily rising.
        sleep: Waits for some seconds.

    Raises:
        LoginRequired: The person has refused, or nobody has approved in time.
        RefreshError: The issuer refuses the client, or its answer makes no sense.
    """
    deadline = clock() + expires_in
    while True:
        sleep(max(min(interval, deadline - clock(), threading.TIMEOUT_MAX), 0.0))
        if clock() >= deadline:
            msg = f"nobody has approved the login within {expires_in:g} s: {LOGIN_HINT} again"
            raise LoginRequired(msg)
        try:
            return ask()
        except Refused as refused:
            interval = _next_interval(refused, interval)
        except http.NotNow as error:
            # Section 3.5: an issuer that cannot answer is asked less often. The person may be half-way through.
            interval = max(interval * 2, error.retry_after or 0.0)


def _next_interval(refused: Refused, interval: float) -> float:
    if refused.error == "authorization_pending":
        return interval
    if refused.error == "slow_down":
        return interval + _SLOW_DOWN_SECONDS
    if refused.passing:
        return interval * 2
    if refused.error == "access_denied":
        msg = f"the login was refused on the other device: {LOGIN_HINT} to try again"
        raise LoginRequired(msg) from None
    if refused.error in {"expired_token", "invalid_grant"}:
        msg = f"the code has expired before anybody approved: {LOGIN_HINT} again"
        raise LoginRequired(msg) from None
    raise refused

"""An access token as it is sent: checked once, ready to be attached without further work."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

AUTHORIZATION: Final = "authorization"

_B64TOKEN: Final = re.compile(r"[A-Za-z0-9\-._~+/]+=*")


@dataclass(frozen=True, slots=True)
class Token:
    """An access token and its expiry. Frozen; its repr never shows the value.

    Args:
        value: The token, an RFC 6750 section 2.1 `b64token`.
        expires_at: Expiry in Unix seconds on the wall clock; None when it is not known.

    Raises:
        ValueError: `value` is no b64token (a control character in it could inject headers), or `expires_at` is not
            a finite number.
        TypeError: An argument is of another type, a datetime for example.
    """

    value: str = field(repr=False)
    expires_at: float | None = None
    header: str = field(init=False, repr=False, compare=False)
    metadata: tuple[tuple[str, str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_b64token(self.value, "the access token")
        check_unix_seconds(self.expires_at, "expires_at")
        header = f"Bearer {self.value}"
        # Built once per token, so that a call with a fresh token allocates nothing.
        object.__setattr__(self, "header", header)
        object.__setattr__(self, "metadata", ((AUTHORIZATION, header),))


def check_b64token(value: object, what: str) -> None:
    """Raises unless `value` is an RFC 6750 b64token; the message never shows the value."""
    if not isinstance(value, str):
        msg = f"{what} must be a str, not {type(value).__name__}"
        raise TypeError(msg)
    if not _B64TOKEN.fullmatch(value):
        msg = (
            f"{what} is not an RFC 6750 b64token: expected one or more of A-Z a-z 0-9 - . _ ~ + / and then only '=' "
            f"(got {len(value)} characters; pass the bare token, without 'Bearer', spaces or line ends)"
        )
        raise ValueError(msg)


def check_unix_seconds(value: object, what: str) -> None:
    """Raises unless `value` is None or a finite number of Unix seconds."""
    if value is None:
        return
    if isinstance(value, datetime):
        kind = "a naive datetime" if value.tzinfo is None else "a datetime"
        msg = f"{what} must be Unix seconds (a float), not {kind}: pass the .timestamp() of a timezone-aware one"
        raise TypeError(msg)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{what} must be Unix seconds (a float) or None, not {type(value).__name__}"
        raise TypeError(msg)
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        finite = False
    if not finite:
        msg = f"{what} must be a finite number of Unix seconds or None, not {value}"
        raise ValueError(msg)

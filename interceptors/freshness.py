"""From when on a session's token should be replaced, and from when on it must be: one pure function."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from interceptors.session import Session

_MANDATORY_SECONDS = 30.0


class Freshness(NamedTuple):
    """The moments (Unix seconds) at which a token changes from fresh to stale, to due, to expired."""

    stale_at: float
    due_at: float
    expires_at: float


def freshness(session: Session, window: float, jitter: float) -> Freshness:
    """When the token of `session` becomes stale (refresh it in the background), due (wait for a refresh), expired.

    Args:
        session: A session; without an expiry its token stays fresh until a server refuses it.
        window: How long before the expiry to refresh, in seconds. A quarter of the lifetime bounds it, since a fixed
            window would refresh on every call when tokens live for less.
        jitter: A number in [0, 1]; shortens the window by up to a tenth, so that clients do not refresh in step.
    """
    expires_at = session.expires_at
    if expires_at is None:
        return Freshness(math.inf, math.inf, math.inf)
    lifetime = max(expires_at - session.issued_at, 0.0)
    proactive = min(window, lifetime / 4) * (1 - jitter / 10)
    mandatory = min(_MANDATORY_SECONDS, lifetime / 10)
    due_at = expires_at - mandatory
    return Freshness(min(expires_at - proactive, due_at), due_at, expires_at)

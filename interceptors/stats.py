"""What a source has done so far, counted by what made it necessary."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Cause(enum.Enum):
    """Why a refresh was needed."""

    PROACTIVE = "proactive"
    MANDATORY = "mandatory"
    REACTIVE = "reactive"


@dataclass(frozen=True)
class SourceStats:
    """What a `RefreshingTokenSource` has done so far.

    Args:
        proactive: Refreshes made ahead of the expiry.
        mandatory: Refreshes that calls had to wait for, because there was no token or it was about to expire.
        reactive: Refreshes that a server's UNAUTHENTICATED forced.
        failures: Attempts to refresh that failed.
        adoptions: Sessions taken over from the store, where another process or a login had put them.
        rejected: Tokens that a server has refused; each counts once.
    """

    proactive: int = 0
    mandatory: int = 0
    reactive: int = 0
    failures: int = 0
    adoptions: int = 0
    rejected: int = 0

    @property
    def refreshes(self) -> int:
        """All refreshes, whatever caused them."""
        return self.proactive + self.mandatory + self.reactive

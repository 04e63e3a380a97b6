"""What happens to the token meanwhile, beyond its expiry."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from interceptors import TokenSource
    from interceptors.testing import FakeIssuer, FakeServer


_OUTAGE_SECONDS: Final = 0.5
_SOON_SECONDS: Final = 1.1
_QUIET_SECONDS: Final = 0.4
_CALLS_TO_LOOK_AT: Final = 40


class Mishaps:
    """Lets things go wrong at set times.

    Args:
        issuer: Goes down for a while.
        server: Refuses streams in their middle.
        source: Whose token is revoked.
        seconds: How long the session lasts.
        say: Told what happens.
    """

    def __init__(
        self, issuer: FakeIssuer, server: FakeServer, source: TokenSource, seconds: float, say: Callable[[str], None]
    ) -> None:
        self._issuer = issuer
        self._server = server
        self._source = source
        self._say = say
        self._outage_ends: float | None = None
        self._quiet_until = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = [
            (seconds * 0.2, self._revoke),
            (seconds * 0.5, self._refuse_an_upload),
            (seconds * 0.6, self._refuse_a_conversation),
            (seconds * 0.8, self._revoke),
        ]
        self._outage_from = seconds * 0.3

    def until(self, passed: float) -> None:
        """Lets happen what is due after `passed` seconds."""
        # One after the other: a refusal while no other token can be had is one that its caller gets.
        if self._outage_ends is not None:
            if passed >= self._outage_ends:
                self._outage_ends, self._outage_from = None, float("inf")
                self._issuer.start()
                self._quiet_until = passed + _QUIET_SECONDS
                self._say("the issuer is up again")
        elif passed < self._quiet_until:
            return
        elif passed >= self._outage_from and self._is_refreshed_soon():
            self._outage_ends = passed + _OUTAGE_SECONDS
            self._issuer.stop()
            self._say("the issuer is down, just when the token should be refreshed")
        elif self._due and self._due[0][0] <= passed and self._is_token_in_use():
            self._due.pop(0)[1]()
            self._quiet_until = passed + _QUIET_SECONDS

    def over(self) -> None:
        """Puts everything right."""
        self._issuer.start()

    def _revoke(self) -> None:
        token = self._source.peek()
        if token is not None:
            self._issuer.revoke(token.value)
            self._say("the server refuses the present token: it was revoked")

    def _is_refreshed_soon(self) -> bool:
        token = self._source.peek()
        return token is not None and token.expires_at is not None and token.expires_at - time.time() < _SOON_SECONDS

    def _is_token_in_use(self) -> bool:
        # A new token that is refused at once means that refreshing does not help: not what is to be shown here.
        token = self._source.peek()
        calls = self._server.calls[-_CALLS_TO_LOOK_AT:]
        return token is None or sum(call.token == token.value for call in calls) >= _CALLS_TO_LOOK_AT // 2

    def _refuse_an_upload(self) -> None:
        self._server.refuse_next(after_messages=5, method="IngestEvents")
        self._say("an upload is refused after it has begun")

    def _refuse_a_conversation(self) -> None:
        self._server.refuse_next(after_messages=1, method="StreamHookEvents")
        self._say("a conversation is refused after it has begun")

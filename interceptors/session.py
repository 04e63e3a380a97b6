"""What a login yields and a store keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from interceptors.tokens import Token, check_unix_seconds

_TEXTS: Final = ("refresh_token", "id_token", "scope", "issuer", "client_id", "subject", "name", "email")


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything a login yielded: the tokens, how long they last, and whose they are. Its repr shows no token.

    Args:
        access_token: The bearer token that calls carry (RFC 6749 section 1.4).
        expires_at: Its expiry in Unix seconds; None when the issuer did not say.
        issued_at: Unix seconds from just before the token request was sent.
        refresh_token: For the refresh grant (RFC 6749 section 6); None when the grant yields none.
        id_token: The OpenID Connect id token as received.
        scope: The granted scope, separated by spaces.
        issuer: The issuer's identifier, a URL.
        client_id: The client that logged in.
        subject: The `sub` claim, unique within the issuer.
        name: The person's name, to be shown.
        email: The person's e-mail address, to be shown.

    Raises:
        ValueError: A token holds characters that no token may hold, or a time is not finite.
        TypeError: A time is a datetime or something else that is not a number, or another field is not text.
    """

    access_token: str = field(repr=False)
    expires_at: float | None = None
    issued_at: float
    refresh_token: str | None = field(default=None, repr=False)
    id_token: str | None = field(default=None, repr=False)
    scope: str | None = None
    issuer: str | None = None
    client_id: str | None = None
    subject: str | None = None
    name: str | None = None
    email: str | None = None

    def __post_init__(self) -> None:
        issued_at: object = self.issued_at
        if issued_at is None:
            msg = "issued_at must be Unix seconds, not None"
            raise TypeError(msg)
        check_unix_seconds(issued_at, "issued_at")
        for name in _TEXTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                msg = f"{name} must be a str or None, not {type(value).__name__}"
                raise TypeError(msg)
        _ = self.token

    @cached_property
    def token(self) -> Token:
        """The access token as a source hands it out."""
        return Token(self.access_token, self.expires_at)

    @property
    def identity(self) -> str:
        """`issuer#subject`, unique over all issuers."""
        return f"{self.issuer or ''}#{self.subject or ''}"

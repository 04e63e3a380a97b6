"""What an issuer knows and decides: its keys and tokens, the logins under way, and the sessions that came of them."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote_plus, urlencode, urlsplit

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, RSAKey

from interceptors.session import Session
from interceptors.testing.loopback import Answer, json_answer, oauth_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"

_INTERVAL_SECONDS: Final = 5.0  # RFC 8628 section 3.2
_SLOW_DOWN_SECONDS: Final = 5.0  # section 3.5


class TokenRefused(Exception):  # noqa: N818 - it says what happened
    """`FakeIssuer.verify` has refused an access token; the message says why."""


@dataclass
class _Family:
    """All tokens that came of one login: using an old refresh token revokes them all (RFC 9700 section 4.14.2)."""

    client_id: str
    scope: str
    nonce: str | None = None
    has_person: bool = True
    refresh_token: str = ""
    revoked: bool = False


@dataclass
class _Grant:
    """A login that is under way: an authorization code, or a device code."""

    client_id: str
    scope: str
    expires_at: float
    redirect_uri: str = ""
    challenge: str = ""
    nonce: str | None = None
    user_code: str = ""
    state: str = "pending"
    interval: float = 0.0
    polled_at: float = -math.inf


class Authority:
    """An issuer but for the server: each endpoint is a method.

    See `FakeIssuer` for the arguments.
    """

    def __init__(
        self,
        *,
        access_token_lifetime: float,
        rotate: bool,
        audience: str,
        client_id: str,
        client_secret: str | None,
        auto_approve: bool,
        clock: Callable[[], float],
    ) -> None:
        self.access_token_lifetime = access_token_lifetime
        self.rotate = rotate
        self.audience = audience
        self.client_id = client_id
        self.client_secret = client_secret
        self.auto_approve = auto_approve
        self.subject = "alice"
        self.device_interval: float | None = None
        """Seconds between two polls of the device flow, as the issuer names it; None: it names none, which means 5.

        Who polls more often while nobody has approved is told to slow down."""
        self._clock = clock
        self._lock = threading.RLock()
        self._refresh_tokens: dict[str, _Family] = {}
        self._grants: dict[str, _Grant] = {}
        self._revoked: set[str] = set()
        self._reuses = 0
        self._keys: list[RSAKey] = [_signing_key(0)]
        self._port = 0

    @property
    def issuer(self) -> str:
        """The issuer's identifier, a URL.

        Raises:
            RuntimeError: The issuer has not been started.
        """
        if not self._port:
            msg = "the fake issuer is not running: use it as a context manager"
            raise RuntimeError(msg)
        return f"http://127.0.0.1:{self._port}"

    url = issuer

    # Tokens

    def session(self, *, scope: str = "openid offline_access email profile", nonce: str | None = None) -> Session:
        """What a login yields, without the login."""
        issued_at = self._clock()
        with self._lock:
            family = _Family(self.client_id, scope, nonce)
            answer = self._tokens(family)
        return Session(
            access_token=answer["access_token"],
            expires_at=issued_at + self.access_token_lifetime,
            issued_at=issued_at,
            refresh_token=answer["refresh_token"],
            id_token=answer.get("id_token"),
            scope=scope,
            issuer=self.issuer,
            client_id=self.client_id,
            subject=self.subject,
            name=self.subject.title(),
            email=f"{self.subject}@example.com",
        )

    def verify(self, access_token: str) -> dict[str, Any]:
        """The claims of an access token that is to be accepted now.

        Raises:
            TokenRefused: Signature, issuer, audience or expiry are wrong, or it was revoked.
        """
        claims = self._claims(access_token)
        if claims.get("iss") != self.issuer or claims.get("aud") != self.audience:
            msg = "wrong issuer or audience"
            raise TokenRefused(msg)
        if claims["exp"] <= self._clock():
            msg = "expired"
            raise TokenRefused(msg)
        with self._lock:
            if claims["jti"] in self._revoked:
                msg = "revoked"
                raise TokenRefused(msg)
        return claims

    def _claims(self, token: str) -> dict[str, Any]:
        try:
            with self._lock:
                keys = KeySet(list(self._keys))
            return jwt.decode(token, keys, algorithms=["RS256"]).claims
        except (JoseError, ValueError) as error:
            msg = f"bad signature ({type(error).__name__})"
            raise TokenRefused(msg) from None

    def revoke(self, access_token: str) -> None:
        """Has `verify` refuse this access token from now on; its session can still be refreshed."""
        with self._lock:
            self._revoked.add(_unverified(access_token)["jti"])

    def end_session(self, session: Session) -> None:
        """Revokes a session's refresh token, and with it every other of the same login."""
        with self._lock:
            family = self._refresh_tokens.get(session.refresh_token or "")
            if family is not None:
                family.revoked = True

    def rotate_keys(self) -> None:
        """Signs with a new key from now on; the old one is no longer published."""
        with self._lock:
            self._keys = [_signing_key(int(str(self._keys[0].kid).removeprefix("key-")) + 1)]

    @property
    def reuses(self) -> int:
        """How often an old refresh token was presented, and a whole session revoked for it."""
        with self._lock:
            return self._reuses

    # People

    def approve(self, user_code: str | None = None) -> None:
        """Grants the device login with this code, or all that are pending."""
        self._decide(user_code, "approved")

    def deny(self, user_code: str | None = None) -> None:
        """Refuses the device login with this code, or all that are pending."""
        self._decide(user_code, "denied")

    def _decide(self, user_code: str | None, state: str) -> None:
        with self._lock:
            for grant in self._grants.values():
                if grant.user_code and user_code in {None, grant.user_code}:
                    grant.state = state

    # What it answers

    def metadata(self) -> dict[str, Any]:
        """The discovery document."""
        issuer = self.issuer
        return {
            "issuer": issuer,
            "authorization_endpoint": f"{issuer}/authorize",
            "token_endpoint": f"{issuer}/token",
            "jwks_uri": f"{issuer}/jwks",
            "revocation_endpoint": f"{issuer}/revoke",
            "device_authorization_endpoint": f"{issuer}/device_authorization",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "code_challenge_methods_supported": ["S256"],
            "authorization_response_iss_parameter_supported": True,
            "grant_types_supported": ["authorization_code", "refresh_token", "client_credentials", DEVICE_GRANT],
        }

    def published_keys(self) -> dict[str, Any]:
        """What its tokens can be verified with."""
        with self._lock:
            return {"keys": [key.as_dict(private=False) for key in self._keys]}

    def token(self, form: Mapping[str, str], authorization: str | None) -> Answer:
        """Answers at the token endpoint."""
        if not self._client_is_known(form, authorization):
            return oauth_error(401, "invalid_client")
        grant_type = form.get("grant_type")
        if grant_type == "refresh_token":
            return self._refresh(form)
        if grant_type == "authorization_code":
            return self._redeem_code(form)
        if grant_type == DEVICE_GRANT:
            return self._redeem_device_code(form)
        if grant_type == "client_credentials" and self.client_secret is not None:
            family = _Family(self.client_id, form.get("scope", ""), has_person=False)
            return json_answer(200, self._tokens(family, refreshable=False))
        return oauth_error(400, "unsupported_grant_type")

    def _client_is_known(self, form: Mapping[str, str], authorization: str | None) -> bool:
        client_id, client_secret = form.get("client_id"), form.get("client_secret")
        if authorization and authorization.startswith("Basic "):
            try:
                client_id, _, client_secret = base64.b64decode(authorization[6:]).decode().partition(":")
            except ValueError:
                return False
            # RFC 6749 section 2.3.1
            client_id, client_secret = unquote_plus(client_id), unquote_plus(client_secret)
        return client_id == self.client_id and client_secret == self.client_secret

    def _refresh(self, form: Mapping[str, str]) -> Answer:
        presented = form.get("refresh_token", "")
        family = self._refresh_tokens.get(presented)
        if family is None or family.revoked:
            return oauth_error(400, "invalid_grant")
        if presented != family.refresh_token:
            family.revoked = True
            self._reuses += 1
            return oauth_error(400, "invalid_grant")
        return json_answer(200, self._tokens(family))

    def _tokens(self, family: _Family, *, refreshable: bool = True) -> dict[str, Any]:
        now, lifetime = self._clock(), self.access_token_lifetime
        key = self._keys[0]
        header = {"alg": "RS256", "kid": key.kid, "typ": "at+jwt"}
        claims = {
            "iss": self.issuer,
            "sub": self.subject if family.has_person else family.client_id,
            "aud": self.audience,
            "client_id": family.client_id,
            "iat": now,
            "exp": now + lifetime,
            "jti": secrets.token_urlsafe(9),
            "scope": family.scope,
        }
        answer: dict[str, Any] = {
            "access_token": jwt.encode(header, claims, key),
            "token_type": "Bearer",
            # A whole number where it is one, as RFC 6749 has it; strict clients read nothing else.
            "expires_in": int(lifetime) if lifetime == int(lifetime) else lifetime,
            "scope": family.scope,
        }
        if refreshable:
            if self.rotate or not family.refresh_token:
                family.refresh_token = secrets.token_urlsafe(24)
                self._refresh_tokens[family.refresh_token] = family
            answer["refresh_token"] = family.refresh_token
        if family.has_person and "openid" in family.scope.split():
            answer["id_token"] = self._id_token(family, now)
        return answer

    def _id_token(self, family: _Family, now: float) -> str:
        key = self._keys[0]
        claims = {
            "iss": self.issuer,
            "sub": self.subject,
            "aud": family.client_id,
            "iat": int(now),
            "exp": int(now) + 3600,
            "name": self.subject.title(),
            "email": f"{self.subject}@example.com",
        }
        if family.nonce is not None:
            claims["nonce"] = family.nonce
        return jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)

    def authorize(self, query: Mapping[str, str]) -> Answer:
        """Answers at the authorization endpoint, where it sends the browser back at once."""
        redirect_uri = query.get("redirect_uri", "")
        known = query.get("client_id") == self.client_id and urlsplit(redirect_uri).hostname in {"127.0.0.1", "::1"}
        if not known or query.get("code_challenge_method") != "S256":
            return oauth_error(400, "invalid_request")
        reply = {"state": query.get("state", ""), "iss": self.issuer}
        if query.get("response_type") != "code":
            reply["error"] = "unsupported_response_type"
        elif self.auto_approve:
            reply["code"] = secrets.token_urlsafe(16)
            with self._lock:
                self._grants[reply["code"]] = _Grant(
                    client_id=self.client_id,
                    scope=query.get("scope", ""),
                    expires_at=self._clock() + 60,
                    redirect_uri=redirect_uri,
                    challenge=query.get("code_challenge", ""),
                    nonce=query.get("nonce"),
                )
        else:
            reply["error"] = "access_denied"
        return Answer(302, b"", {"Location": f"{redirect_uri}?{urlencode(reply)}"})

    def _redeem_code(self, form: Mapping[str, str]) -> Answer:
        grant = self._grants.get(form.get("code", ""))
        if grant is None or grant.user_code:
            return oauth_error(400, "invalid_grant")
        del self._grants[form["code"]]
        verifier = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(verifier).rstrip(b"=").decode()
        right = (grant.challenge, grant.redirect_uri) == (challenge, form.get("redirect_uri"))
        if not right or grant.expires_at < self._clock():
            return oauth_error(400, "invalid_grant")
        return self._begin_session(grant)

    def _begin_session(self, grant: _Grant) -> Answer:
        family = _Family(grant.client_id, grant.scope, grant.nonce)
        return json_answer(200, self._tokens(family, refreshable="offline_access" in grant.scope.split()))

    def device_authorization(self, form: Mapping[str, str], authorization: str | None) -> Answer:
        """Answers at the device authorization endpoint."""
        if not self._client_is_known(form, authorization):
            return oauth_error(401, "invalid_client")
        device_code, user_code = secrets.token_urlsafe(16), secrets.token_hex(4).upper()
        with self._lock:
            self._grants[device_code] = _Grant(
                client_id=self.client_id,
                scope=form.get("scope", ""),
                expires_at=self._clock() + 300,
                user_code=user_code,
                state="approved" if self.auto_approve else "pending",
                interval=_INTERVAL_SECONDS if self.device_interval is None else self.device_interval,
            )
        answer: dict[str, Any] = {
            "device_code": device_code,
            "user_code": user_code,
            "verification_uri": f"{self.issuer}/device",
            "verification_uri_complete": f"{self.issuer}/device?user_code={user_code}",
            "expires_in": 300,
        }
        if self.device_interval is not None:
            answer["interval"] = self.device_interval
        return json_answer(200, answer)

    def _redeem_device_code(self, form: Mapping[str, str]) -> Answer:
        grant = self._grants.get(form.get("device_code", ""))
        if grant is None or not grant.user_code:
            return oauth_error(400, "invalid_grant")
        if grant.expires_at < self._clock():
            return oauth_error(400, "expired_token")
        if grant.state == "pending":
            # Not the issuer's clock: a client waits in real time, whatever a test makes of expiries.
            now = time.monotonic()
            too_early, grant.polled_at = now < grant.polled_at + grant.interval, now
            if too_early:
                grant.interval += _SLOW_DOWN_SECONDS
            return oauth_error(400, "slow_down" if too_early else "authorization_pending")
        del self._grants[form["device_code"]]
        return self._begin_session(grant) if grant.state == "approved" else oauth_error(400, "access_denied")

    def revocation(self, token: str) -> Answer:
        """Answers at the revocation endpoint."""
        with self._lock:
            family = self._refresh_tokens.get(token)
            if family is not None:
                family.revoked = True
            else:
                # RFC 7009 section 2.2: revoking what is no token, or no access token, is no error.
                with suppress(TokenRefused, KeyError):
                    self._revoked.add(self._claims(token)["jti"])
        return Answer(200, b"")


@cache
def _signing_key(number: int) -> RSAKey:
    # Generating one takes a tenth of a second, so that all issuers of a process share them.
    return RSAKey.generate_key(2048, parameters={"kid": f"key-{number}", "use": "sig", "alg": "RS256"})


def _unverified(access_token: str) -> dict[str, Any]:
    payload = access_token.split(".")[1]
    return cast("dict[str, Any]", json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))))

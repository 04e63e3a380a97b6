"""The client of an OpenID issuer: every way to a session, and back."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn

from interceptors.errors import LOGIN_HINT, AuthError, LoginRequired, RefreshError
from interceptors.forking import renew_after_fork
from interceptors.oidc import http
from interceptors.session import Session
from interceptors.tokens import check_b64token

if TYPE_CHECKING:
    from collections.abc import Mapping

    from interceptors.oidc.discovery import Metadata
    from interceptors.oidc.id_tokens import IdTokenChecker

_OK: Final = 200
_FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}
_DISCOVERY_SECONDS: Final = 3600.0
_DEFAULT_SCOPE: Final = "openid offline_access email profile"
# RFC 6749 section 5.2: what no later attempt with the same refresh token can change.
_PERMANENT: Final = frozenset({"invalid_grant"})


class OidcClient:
    """Asks an OpenID issuer for sessions. Makes no request before it is used. Thread-safe.

    Args:
        issuer: The issuer's identifier, exactly as it names itself: an https URL (http only on loopback).
        client_id: As registered with the issuer.
        client_secret: Only for confidential clients.
        scope: What to ask for, separated by spaces.
        timeout: The longest that one request may take, in seconds.

    Raises:
        ValueError: `issuer` is no such URL, `client_id` is empty, or `timeout` is not positive.
        TypeError: An argument is of another type.
    """

    def __init__(
        self,
        issuer: str,
        client_id: str,
        *,
        client_secret: str | None = None,
        scope: str = _DEFAULT_SCOPE,
        timeout: float = 10.0,
    ) -> None:
        for name, value in (("issuer", issuer), ("client_id", client_id), ("scope", scope)):
            if not isinstance(value, str):
                msg = f"{name} must be a str, not {type(value).__name__}"
                raise TypeError(msg)
        if not http.is_secure(issuer) or "?" in issuer or "#" in issuer:
            msg = f"issuer must be an https URL without query or fragment (http only on loopback), it is {issuer!r}"
            raise ValueError(msg)
        if not client_id:
            msg = "client_id must not be empty: use the one that is registered with the issuer"
            raise ValueError(msg)
        if client_secret is not None and not isinstance(client_secret, str):
            msg = f"client_secret must be a str or None, not {type(client_secret).__name__}"
            raise TypeError(msg)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            msg = f"timeout must be a number of seconds, not {type(timeout).__name__}"
            raise TypeError(msg)
        if not (timeout > 0 and math.isfinite(timeout)):
            msg = f"timeout must be a positive number of seconds, not {timeout}"
            raise ValueError(msg)
        self.issuer = issuer
        self.client_id = client_id
        self._client_secret = client_secret
        self._scope = scope
        self._timeout = timeout
        self._discovered: tuple[float, Metadata, IdTokenChecker] | None = None
        self._after_fork_in_child()
        renew_after_fork(self)

    def _after_fork_in_child(self) -> None:
        self._discovering = threading.Lock()

    def refresh(self, session: Session | None) -> Session:
        """A new session for an old one, by the refresh grant (RFC 6749 section 6).

        Args:
            session: The present session; None if there is none.

        Raises:
            LoginRequired: There is no session, it has no refresh token, or the issuer does not accept it any more.
            RefreshError: The issuer could not be asked, or gave no usable answer.
        """
        if session is None:
            msg = f"nobody is logged in at {self.issuer}: {LOGIN_HINT}"
            raise LoginRequired(msg)
        if not session.refresh_token:
            msg = f"the session at {self.issuer} has expired and has no refresh token: {LOGIN_HINT}"
            raise LoginRequired(msg)
        issued_at, answer = self._token_request("refresh_token", {"refresh_token": session.refresh_token})
        return self._session(answer, issued_at, before=session)

    def client_credentials(self, session: Session | None = None) -> Session:  # noqa: ARG002 - a refresher's signature
        """A session for the client itself (RFC 6749 section 4.4). It needs none before, so it is a refresher as well.

        Raises:
            RefreshError: The issuer could not be asked, or refused.
            AuthError: The client has no secret.
        """
        if self._client_secret is None:
            msg = "the client credentials grant needs a confidential client: pass client_secret"
            raise AuthError(msg)
        scope = "" if self._scope == _DEFAULT_SCOPE else self._scope
        issued_at, answer = self._token_request("client_credentials", {"scope": scope} if scope else {})
        return self._session(answer, issued_at)

    def revoke(self, session: Session) -> None:
        """Revokes a session's tokens at the issuer (RFC 7009), so that a copy of them is worthless.

        An issuer without a revocation endpoint is left alone: the tokens then end by their expiry.

        Raises:
            RefreshError: The issuer could not be asked; the tokens may still be valid.
        """
        endpoint = self._metadata().revocation_endpoint
        if endpoint is None:
            return
        for hint, token in (("refresh_token", session.refresh_token), ("access_token", session.access_token)):
            if token:
                response = self._post(endpoint, {"token": token, "token_type_hint": hint})
                # Section 2.2.1: an issuer may be unable to revoke access tokens, and says so.
                if response.status != _OK and hint == "refresh_token":
                    msg = f"{self.issuer} did not revoke the session (HTTP {response.status}): try again later"
                    raise RefreshError(msg)

    def __repr__(self) -> str:
        return f"OidcClient({self.issuer!r}, {self.client_id!r})"

    # One request at the token endpoint

    def _token_request(self, grant_type: str, parameters: Mapping[str, str]) -> tuple[float, dict[str, Any]]:
        endpoint = self._metadata().token_endpoint
        # Expiry counts from before the request: how long the answer took is not the token's.
        issued_at = time.time()
        response = self._post(endpoint, {"grant_type": grant_type, **parameters})
        answer = response.content
        if response.status != _OK or (answer is not None and "error" in answer):
            self._refused(endpoint, response)
        if answer is None:
            msg = f"{endpoint} answered with something that is not a JSON object"
            raise RefreshError(msg)
        return issued_at, answer

    def _post(self, endpoint: str, parameters: Mapping[str, str]) -> http.Response:
        from authlib.common.urls import add_params_to_qs
        from authlib.oauth2.auth import ClientAuth

        method = "none"
        if self._client_secret is not None:
            methods = self._metadata().token_endpoint_auth_methods
            basic = "client_secret_basic" in methods or "client_secret_post" not in methods
            method = "client_secret_basic" if basic else "client_secret_post"
        auth = ClientAuth(self.client_id, self._client_secret, method)
        body = add_params_to_qs("", list(parameters.items()))
        url, headers, body = auth.prepare("POST", endpoint, dict(_FORM), body)
        headers.pop("Content-Length", None)  # httpx counts what it sends
        return http.request("POST", url, timeout=self._timeout, body=body, headers=headers)

    def _refused(self, endpoint: str, response: http.Response) -> NoReturn:
        error = (response.content or {}).get("error")
        if not isinstance(error, str):
            self._discovered = None  # the endpoint may have moved
            msg = (
                f"{endpoint} answered HTTP {response.status} without an OAuth error: is it the issuer's token endpoint?"
            )
            raise RefreshError(msg, retry_after=response.retry_after)
        error = "".join(character for character in error[:64] if character.isalnum() or character == "_")
        if error in _PERMANENT:
            msg = f"the session at {self.issuer} has ended ({error}): {LOGIN_HINT}"
            raise LoginRequired(msg)
        msg = f"{self.issuer} refused the client {self.client_id!r} ({error}): check how the client is registered"
        raise RefreshError(msg, retry_after=response.retry_after)

    # What an answer yields

    def _session(
        self, answer: Mapping[str, Any], issued_at: float, *, before: Session | None = None, nonce: str | None = None
    ) -> Session:
        token_type = answer.get("token_type")
        if not isinstance(token_type, str) or token_type.lower() != "bearer":
            raise self._unusable("its token_type is not Bearer")
        try:
            check_b64token(answer.get("access_token"), "the access token")
        except (TypeError, ValueError) as error:
            why = str(error)
            raise self._unusable(why) from None
        refresh_token, id_token, scope = (self._text(answer, key) for key in ("refresh_token", "id_token", "scope"))
        identity = self._identity(id_token, before, nonce)
        expires_in = self._expires_in(answer.get("expires_in"))
        return Session(
            access_token=answer["access_token"],
            expires_at=None if expires_in is None else issued_at + expires_in,
            issued_at=issued_at,
            # RFC 6749 section 6: what the answer leaves out stays as it was.
            refresh_token=refresh_token or (before.refresh_token if before else None),
            id_token=id_token or (before.id_token if before else None),
            scope=scope or (before.scope if before else self._scope),
            issuer=self.issuer,
            client_id=self.client_id,
            **identity,
        )

    def _identity(self, id_token: str | None, before: Session | None, nonce: str | None) -> dict[str, str | None]:
        identity = {name: getattr(before, name) if before else None for name in ("subject", "name", "email")}
        if id_token is None:
            if nonce is not None and "openid" in self._scope.split():
                raise self._unusable("it has no id token")
            return identity
        from interceptors.oidc.id_tokens import KeysUnavailable

        try:
            claims = self._discover()[1].claims(id_token, nonce=nonce)
        except KeysUnavailable:
            if before is None:
                raise
            # The old refresh token is spent: to lose the new one over an id token would be to lose the session.
            return identity
        if before is not None and before.subject is not None and claims["sub"] != before.subject:
            # OpenID Connect Core section 12.2: the issuer was checked, the subject must stay as well.
            raise self._unusable("its id token is about another subject")
        identity["subject"] = claims["sub"]
        for name in ("name", "email"):
            if isinstance(claims.get(name), str):
                identity[name] = claims[name]
        return identity

    def _expires_in(self, value: object) -> float | None:
        if value is None:
            return None
        try:
            # Some issuers send it as a string.
            seconds = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        except ValueError:
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds >= 0):
            raise self._unusable("its expires_in is no number of seconds")
        return seconds

    def _text(self, answer: Mapping[str, Any], key: str) -> str | None:
        value = answer.get(key)
        if value is not None and not isinstance(value, str):
            why = f"its {key} is no string"
            raise self._unusable(why)
        return value or None

    def _unusable(self, why: str) -> RefreshError:
        return RefreshError(f"the answer from {self.issuer} is not usable: {why}")

    # Discovery

    def _metadata(self) -> Metadata:
        return self._discover()[0]

    def _discover(self) -> tuple[Metadata, IdTokenChecker]:
        from interceptors.oidc.discovery import discover
        from interceptors.oidc.id_tokens import IdTokenChecker

        with self._discovering:
            now = time.monotonic()
            discovered = self._discovered
            if discovered is not None and now - discovered[0] < _DISCOVERY_SECONDS:
                return discovered[1], discovered[2]
            metadata = discover(self.issuer, self._timeout)
            checker = IdTokenChecker(metadata, self.client_id, self._timeout)
            self._discovered = (now, metadata, checker)
            return metadata, checker

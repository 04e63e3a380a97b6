"""The client of an OpenID issuer: every way to a session, and back."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote_plus, urlsplit

from interceptors.errors import LOGIN_HINT, AuthError, LoginRequired, RefreshError
from interceptors.forking import renew_after_fork
from interceptors.oidc import http
from interceptors.oidc.answers import Refused, refusal, session_from, unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from interceptors.oidc.browser import Redeemable
    from interceptors.oidc.device import DeviceLogin
    from interceptors.oidc.discovery import Metadata
    from interceptors.oidc.id_tokens import IdTokenChecker
    from interceptors.session import Session

_FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}
_DISCOVERY_SECONDS: Final = 3600.0
_DEFAULT_SCOPE: Final = "openid offline_access email profile"
# What no later attempt with the same refresh token can change: RFC 6749 section 5.2; some issuers let the person know
# in OpenID Connect's words (Core section 3.1.2.6).
_SESSION_ENDED: Final = frozenset({"invalid_grant", "interaction_required", "login_required", "consent_required"})


def _open_browser(address: str) -> bool:
    import webbrowser

    return webbrowser.open(address)


class OidcClient:
    """Asks an OpenID issuer for sessions. Makes no request before it is used. Thread-safe.

    An issuer that refuses the client itself (`invalid_client`, `unauthorized_client`) is a `RefreshError`, as its
    registration can be mended while a session runs: a source asks again, ever less often.

    Args:
        issuer: The issuer's identifier, exactly as it names itself: an https URL (http only on loopback).
        client_id: As registered with the issuer.
        client_secret: Only for confidential clients.
        scope: What to ask for, separated by spaces.
        timeout: The longest that one request may take, in seconds.

    Raises:
        ValueError: `issuer` is no such URL, `client_id` or `client_secret` is empty, or `timeout` is not positive.
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
        if client_secret is not None and not isinstance(client_secret, str):
            msg = f"client_secret must be a str or None, not {type(client_secret).__name__}"
            raise TypeError(msg)
        if not http.is_secure(issuer) or "?" in issuer or "#" in issuer or "@" in urlsplit(issuer).netloc:
            shown = "another" if "@" in issuer else repr(issuer)  # what is before an @ may be a password
            msg = f"issuer must be an https URL without user, query or fragment (http only on loopback), not {shown}"
            raise ValueError(msg)
        if not client_id:
            msg = "client_id must not be empty: use the one that is registered with the issuer"
            raise ValueError(msg)
        if client_secret == "":
            msg = "client_secret must not be empty: leave it out if the client is a public one"
            raise ValueError(msg)
        self._timeout = _seconds(timeout, "timeout")
        self.issuer = issuer
        self.client_id = client_id
        self._client_secret = client_secret
        self._scope = scope
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
            LoginRequired: There is no session, it has no refresh token, it is another issuer's or client's, or the
                issuer does not accept it any more.
            RefreshError: The issuer could not be asked, or gave no usable answer.
        """
        if session is None:
            msg = f"nobody is logged in at {self.issuer}: {LOGIN_HINT}"
            raise LoginRequired(msg)
        if not session.refresh_token:
            msg = f"the session at {self.issuer} has expired and has no refresh token: {LOGIN_HINT}"
            raise LoginRequired(msg)
        self._check_owner(session)
        # All that the answer is read with is there before the refresh token is spent.
        metadata, checker = self._discover()
        try:
            issued_at, answer = self._token_request(metadata, "refresh_token", {"refresh_token": session.refresh_token})
        except Refused as refused:
            if refused.error not in _SESSION_ENDED:
                raise
            msg = f"the session at {self.issuer} has ended ({refused.error}): {LOGIN_HINT}"
            raise LoginRequired(msg) from None
        return self._session(answer, issued_at, checker, before=session)

    def login(self, *, open_browser: Callable[[str], object] = _open_browser, timeout: float = 300.0) -> Session:
        """A session for the person who logs in with the browser: authorization code and PKCE (RFC 8252, RFC 7636).

        The address is printed on stderr as well, for machines on which no browser opens. Where the person's browser
        runs on another machine, use `device_login`.

        Args:
            open_browser: Is called with the address to open, on a thread of its own; `webbrowser.open` by default.
            timeout: The longest to wait for the person, in seconds.

        Raises:
            LoginRequired: The person has refused, or was not done in time.
            RefreshError: The issuer could not be asked, or gave no usable answer.
            AuthError: The issuer refuses the client, has no such login, or an answer is not to be trusted.
            ValueError: `timeout` is not positive.
            TypeError: An argument is of another type.
        """
        from interceptors.oidc.browser import login_in_browser

        if not callable(open_browser):
            msg = f"open_browser must be a function of the address, not {type(open_browser).__name__}"
            raise TypeError(msg)
        timeout = _seconds(timeout, "timeout")
        metadata, checker = self._discover()
        return login_in_browser(
            metadata,
            self.client_id,
            self._scope,
            open_browser=open_browser,
            timeout=timeout,
            redeem=lambda redeemable: self._redeem(redeemable, metadata, checker),
        )

    def device_login(self, prompt: Callable[[DeviceLogin], object], *, timeout: float | None = None) -> Session:
        """A session for a person who logs in on any other device (RFC 8628).

        Args:
            prompt: Is called once, with what to tell the person: `verification_uri`, `user_code`,
                `verification_uri_complete` (None if there is none) and `expires_in` (seconds). Waiting begins when it
                returns.
            timeout: The longest to wait for the person, in seconds; None waits for as long as the code is good.

        Raises:
            LoginRequired: The person has refused, or was not done in time.
            RefreshError: The issuer could not be asked, or gave no usable answer.
            AuthError: The issuer has no such login.
            ValueError: `timeout` is not positive.
            TypeError: An argument is of another type.
        """
        from interceptors.oidc.device import DEVICE_GRANT, device_authorization_from, poll

        if not callable(prompt):
            msg = f"prompt must be a function of what to tell the person, not {type(prompt).__name__}"
            raise TypeError(msg)
        longest = math.inf if timeout is None else _seconds(timeout, "timeout")
        metadata, checker = self._discover()
        endpoint = metadata.device_authorization_endpoint
        if endpoint is None:
            msg = f'{self.issuer} offers no login on another device: try "interceptors login" without --device'
            raise AuthError(msg)
        begun = device_authorization_from(self._ask(metadata, endpoint, {"scope": self._scope}), self.issuer)
        prompt(begun.login)
        issued_at, answer = poll(
            lambda: self._token_request(metadata, DEVICE_GRANT, {"device_code": begun.device_code}),
            interval=begun.interval,
            expires_in=min(begun.login.expires_in, longest),
        )
        return self._session(answer, issued_at, checker, scope=self._scope)

    def client_credentials(self, session: Session | None = None) -> Session:  # noqa: ARG002 - a refresher's signature
        """A session for the client itself (RFC 6749 section 4.4). It needs none before, so it is a refresher as well.

        The default scope, which asks about a person, is left out.

        Raises:
            RefreshError: The issuer could not be asked, or refused.
            AuthError: The client has no secret.
        """
        if self._client_secret is None:
            msg = "the client credentials grant needs a confidential client: pass client_secret"
            raise AuthError(msg)
        scope = None if self._scope == _DEFAULT_SCOPE else self._scope
        metadata, checker = self._discover()
        issued_at, answer = self._token_request(metadata, "client_credentials", {"scope": scope} if scope else {})
        return self._session(answer, issued_at, checker, scope=scope)

    def revoke(self, session: Session) -> None:
        """Revokes a session's tokens at the issuer (RFC 7009), so that a copy of them is worthless.

        The refresh token first, with which most issuers end all that came of it. An issuer without a revocation
        endpoint is left alone: the tokens then end by their expiry.

        Raises:
            RefreshError: The issuer could not be asked; the tokens may still be valid.
            LoginRequired: The session is another issuer's or client's.
        """
        self._check_owner(session)
        metadata, _ = self._discover()
        endpoint = metadata.revocation_endpoint
        if endpoint is None:
            return
        failures = []
        for hint, token in (("refresh_token", session.refresh_token), ("access_token", session.access_token)):
            try:
                if token:
                    self._revoke(metadata, endpoint, token, hint)
            except RefreshError as error:
                # Section 2.2.1: an issuer may be unable to revoke access tokens, and says so.
                if hint == "refresh_token" or isinstance(error, http.NotNow):
                    failures.append(error)
        if failures:
            raise failures[0]

    def __repr__(self) -> str:
        return f"OidcClient({self.issuer!r}, {self.client_id!r})"

    def _check_owner(self, session: Session) -> None:
        # A token is shown to nobody but the issuer that it is from.
        for what, owner, ours in (
            ("issuer", session.issuer, self.issuer),
            ("client", session.client_id, self.client_id),
        ):
            if owner is not None and owner != ours:
                msg = f"the session is one of the {what} {owner!r}, not {ours!r}: {LOGIN_HINT}, or use another profile"
                raise LoginRequired(msg)

    # Asking

    def _redeem(self, redeemable: Redeemable, metadata: Metadata, checker: IdTokenChecker) -> Session:
        try:
            issued_at, answer = self._token_request(
                metadata,
                "authorization_code",
                {
                    "code": redeemable.code,
                    "redirect_uri": redeemable.redirect_uri,
                    "code_verifier": redeemable.verifier,
                },
            )
        except Refused as refused:
            if refused.error != "invalid_grant":
                raise
            msg = f"{self.issuer} did not accept the login ({refused.error}): {LOGIN_HINT} again"
            raise LoginRequired(msg) from None
        return self._session(answer, issued_at, checker, scope=self._scope, nonce=redeemable.nonce)

    def _revoke(self, metadata: Metadata, endpoint: str, token: str, hint: str) -> None:
        response = self._post(metadata, endpoint, {"token": token, "token_type_hint": hint})
        if not response.is_success:
            refused = response.status == http.UNAUTHORIZED
            what_to_do = f"check the client {self.client_id!r} and its secret" if refused else "try again later"
            msg = f"{self.issuer} did not revoke the session (HTTP {response.status}): {what_to_do}"
            raise RefreshError(msg, retry_after=response.retry_after)

    def _token_request(
        self, metadata: Metadata, grant_type: str, parameters: Mapping[str, str]
    ) -> tuple[float, dict[str, Any]]:
        # Expiry counts from before the request: how long the answer took is not the token's.
        issued_at = time.time()
        return issued_at, self._ask(metadata, metadata.token_endpoint, {"grant_type": grant_type, **parameters})

    def _ask(self, metadata: Metadata, endpoint: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        try:
            response = self._post(metadata, endpoint, parameters)
        except http.Unreachable:
            self._discovered = None  # the endpoint may have moved
            raise
        answer = response.content
        error = (answer or {}).get("error") or None  # an empty one says nothing
        if isinstance(error, str):
            raise refusal(self.issuer, self.client_id, error, response.retry_after)
        if answer is None or error is not None or response.status != http.OK:
            self._discovered = None
            msg = (
                f"{endpoint} answered HTTP {response.status} without what OAuth asks for: is it the issuer's endpoint?"
            )
            raise RefreshError(msg, retry_after=response.retry_after)
        return answer

    def _post(self, metadata: Metadata, endpoint: str, parameters: Mapping[str, str]) -> http.Response:
        from authlib.common.urls import add_params_to_qs
        from authlib.oauth2.auth import ClientAuth

        client_id, client_secret, method = self.client_id, self._client_secret, "none"
        if client_secret is not None:
            methods = metadata.token_endpoint_auth_methods
            basic = "client_secret_basic" in methods or "client_secret_post" not in methods
            method = "client_secret_basic" if basic else "client_secret_post"
            if basic:
                # RFC 6749 section 2.3.1, which Authlib leaves to its callers.
                client_id, client_secret = quote_plus(client_id), quote_plus(client_secret)
        auth = ClientAuth(client_id, client_secret, method)
        body = add_params_to_qs("", list(parameters.items()))
        url, headers, body = auth.prepare("POST", endpoint, dict(_FORM), body)
        return http.request("POST", url, timeout=self._timeout, body=body, headers=headers)

    # What an answer yields

    def _session(
        self,
        answer: Mapping[str, Any],
        issued_at: float,
        checker: IdTokenChecker,
        *,
        scope: str | None = None,
        before: Session | None = None,
        nonce: str | None = None,
    ) -> Session:
        def claims_of(id_token: str | None) -> Mapping[str, Any] | None:
            return self._claims(id_token, checker, before, nonce)

        return session_from(
            answer,
            issuer=self.issuer,
            client_id=self.client_id,
            scope=scope,
            issued_at=issued_at,
            before=before,
            claims_of=claims_of,
        )

    def _claims(
        self, id_token: str | None, checker: IdTokenChecker, before: Session | None, nonce: str | None
    ) -> Mapping[str, Any] | None:
        from interceptors.oidc.id_tokens import KeysUnavailable

        if id_token is None:
            if nonce is not None and "openid" in self._scope.split():
                raise unusable(self.issuer, "it has no id token")
            return None
        if before is None:
            return checker.at_login(id_token, nonce=nonce)
        try:
            return checker.at_refresh(id_token, subject=before.subject)
        except KeysUnavailable:
            # The old refresh token is spent: to lose the new one over an id token would be to lose the session.
            return None

    # Discovery

    def _discover(self) -> tuple[Metadata, IdTokenChecker]:
        from interceptors.oidc.discovery import discover
        from interceptors.oidc.id_tokens import IdTokenChecker

        with self._discovering:
            now = time.monotonic()
            discovered = self._discovered
            if discovered is not None and now - discovered[0] < _DISCOVERY_SECONDS:
                return discovered[1], discovered[2]
            try:
                metadata = discover(self.issuer, self._timeout)
            except RefreshError:
                if discovered is None:
                    raise
                # What it said an hour ago is better than nothing.
                return discovered[1], discovered[2]
            checker = IdTokenChecker(metadata, self.client_id, self._timeout)
            self._discovered = (now, metadata, checker)
            return metadata, checker


def _seconds(value: object, name: str) -> float:
    """As many seconds as `value` says, or as many as can be waited for."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{name} must be a number of seconds, not {type(value).__name__}"
        raise TypeError(msg)
    if not (value > 0 and math.isfinite(value)):
        msg = f"{name} must be a positive number of seconds, not {value}"
        raise ValueError(msg)
    return min(value, threading.TIMEOUT_MAX)

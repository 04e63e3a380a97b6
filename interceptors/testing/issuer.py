"""A real OpenID issuer on loopback, in a thread, that can be made to fail in every way that issuers fail."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import secrets
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final, Self, cast
from urllib.parse import parse_qs, unquote_plus, urlencode, urlsplit

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, RSAKey

from interceptors.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"


class TokenRefused(Exception):  # noqa: N818 - it says what happened
    """`FakeIssuer.verify` has refused an access token; the message says why."""


@dataclass(frozen=True)
class IssuerRequest:
    """A request that the issuer has received."""

    path: str
    grant_type: str | None
    status: int
    at: float


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


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


class FakeIssuer:
    """An OpenID issuer for tests: discovery, JWKS, all grants with refresh rotation and reuse detection, revocation.

    Access tokens are RS256 JWTs. Use it as a context manager; it serves when entered.

    Args:
        access_token_lifetime: Seconds that an access token lives; fractions are fine.
        rotate: Whether each refresh yields a new refresh token and makes the old one a trap.
        audience: The `aud` of access tokens.
        client_id: The public client that may log in.
        client_secret: Makes the client a confidential one.
        auto_approve: Whether logins are granted without a person; if not, see `approve` and `deny`.
        clock: Unix seconds, for expiries.
    """

    def __init__(
        self,
        *,
        access_token_lifetime: float = 3600.0,
        rotate: bool = True,
        audience: str = "urn:test:api",
        client_id: str = "test-client",
        client_secret: str | None = None,
        auto_approve: bool = True,
        clock: Callable[[], float] = time.time,
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
        self.requests: list[IssuerRequest] = []
        """Every request that was answered, oldest first."""
        self.delay = 0.0
        """Seconds before a token request is answered."""
        self._clock = clock
        self._lock = threading.RLock()
        self._open = threading.Event()
        self._open.set()
        self._arrived = threading.Condition(self._lock)
        self._arrivals = 0
        self._scripted: list[tuple[str, _Answer]] = []
        self._families: list[_Family] = []
        self._refresh_tokens: dict[str, _Family] = {}
        self._grants: dict[str, _Grant] = {}
        self._revoked: set[str] = set()
        self._reuses = 0
        self._keys: list[RSAKey] = [_signing_key(0)]
        self._server: _Server | None = None
        self._port = 0

    # Running

    def start(self) -> Self:
        """Starts to serve; the port stays the same over a `stop`."""
        with self._lock:
            if self._server is None:
                self._server = _Server(self, self._port)
                self._port = self._server.server_address[1]
                threading.Thread(
                    target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, name="fake-issuer", daemon=True
                ).start()
        return self

    def stop(self) -> None:
        """Stops to serve: connections are refused."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.hang_up()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.set()
        self.stop()

    @property
    def issuer(self) -> str:
        """The issuer's identifier, a URL."""
        return f"http://127.0.0.1:{self._port}"

    url = issuer

    # Tokens

    def session(self, *, scope: str = "openid offline_access email profile", nonce: str | None = None) -> Session:
        """What a login yields, without the login."""
        issued_at = self._clock()
        with self._lock:
            family = _Family(self.client_id, scope, nonce)
            self._families.append(family)
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

    # Failing

    def hold(self) -> None:
        """Token requests wait from now on, until `release`."""
        self._open.clear()

    def release(self) -> None:
        """Ends `hold`."""
        self._open.set()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuses connections within the context."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def answer_with(
        self,
        status: int,
        body: bytes | str | Mapping[str, Any] = b"",
        headers: Mapping[str, str] | None = None,
        *,
        times: int = 1,
        path: str = "/token",
    ) -> None:
        """Answers the next requests for `path` with this, whatever it is; by default the next token requests.

        Args:
            status: HTTP's.
            body: As it is, or what is sent as JSON.
            headers: What is sent along.
            times: How many requests are answered so.
            path: Also `/jwks`, `/.well-known/openid-configuration`, `/device_authorization`, `/authorize`, `/revoke`.
        """
        headers = dict(headers or {})
        if isinstance(body, (bytes, str)):
            content = body.encode() if isinstance(body, str) else body
        else:
            content = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        with self._lock:
            self._scripted += [(path, _Answer(status, content, headers))] * times

    def fail_next(self, times: int = 1, *, status: int = 503, error: str = "temporarily_unavailable") -> None:
        """Fails the next token requests with an OAuth error (RFC 6749 section 5.2)."""
        self.answer_with(status, {"error": error}, times=times)

    # Counting

    @property
    def token_requests(self) -> list[IssuerRequest]:
        """The requests at the token endpoint that were answered."""
        with self._lock:
            return [request for request in self.requests if request.path == "/token"]

    @property
    def refreshes(self) -> int:
        """How many refresh grants have succeeded."""
        return sum(r.status == 200 and r.grant_type == "refresh_token" for r in self.token_requests)  # noqa: PLR2004

    @property
    def reuses(self) -> int:
        """How often an old refresh token was presented, and a whole session revoked for it."""
        with self._lock:
            return self._reuses

    def wait_for_token_requests(self, count: int, timeout: float = 10.0) -> None:
        """Waits until `count` token requests have arrived, answered or not, since the issuer was made.

        Raises:
            TimeoutError: They did not arrive within `timeout` seconds.
        """
        with self._lock:
            if not self._arrived.wait_for(lambda: self._arrivals >= count, timeout):
                msg = f"{self._arrivals} token requests arrived within {timeout:g} s, not {count}"
                raise TimeoutError(msg)

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

    # Answering

    def _handle(self, method: str, target: str, body: bytes, authorization: str | None) -> _Answer:
        parts = urlsplit(target)
        form = {name: values[0] for name, values in parse_qs(body.decode("latin-1")).items()}
        grant_type: str | None = None
        if method == "POST" and parts.path == "/token":
            grant_type = form.get("grant_type")
            with self._lock:
                self._arrivals += 1
                self._arrived.notify_all()
            self._open.wait()
            if self.delay:
                time.sleep(self.delay)
        scripted = self._next_scripted(parts.path)
        if scripted is not None:
            answer = scripted
        elif method == "POST" and parts.path == "/token":
            with self._lock:
                answer = self._token(form, authorization)
        elif method == "GET" and parts.path in _DISCOVERY:
            answer = _json(200, self._metadata())
        elif method == "GET" and parts.path == "/jwks":
            with self._lock:
                answer = _json(200, {"keys": [key.as_dict(private=False) for key in self._keys]})
        elif method == "GET" and parts.path == "/authorize":
            answer = self._authorize({name: values[0] for name, values in parse_qs(parts.query).items()})
        elif method == "POST" and parts.path == "/device_authorization":
            answer = self._device_authorization(form, authorization)
        elif method == "POST" and parts.path == "/revoke":
            answer = self._revoke(form.get("token", ""))
        else:
            answer = _json(404, {})
        with self._lock:
            self.requests.append(IssuerRequest(parts.path, grant_type, answer.status, self._clock()))
        return answer

    def _next_scripted(self, path: str) -> _Answer | None:
        with self._lock:
            for index, (of, answer) in enumerate(self._scripted):
                if of == path:
                    del self._scripted[index]
                    return answer
        return None

    def _metadata(self) -> dict[str, Any]:
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

    def _token(self, form: Mapping[str, str], authorization: str | None) -> _Answer:
        if not self._client_is_known(form, authorization):
            return _error(401, "invalid_client")
        grant_type = form.get("grant_type")
        if grant_type == "refresh_token":
            return self._refresh(form)
        if grant_type == "authorization_code":
            return self._redeem_code(form)
        if grant_type == DEVICE_GRANT:
            return self._redeem_device_code(form)
        if grant_type == "client_credentials" and self.client_secret is not None:
            family = _Family(self.client_id, form.get("scope", ""), has_person=False)
            return _json(200, self._tokens(family, refreshable=False))
        return _error(400, "unsupported_grant_type")

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

    def _refresh(self, form: Mapping[str, str]) -> _Answer:
        presented = form.get("refresh_token", "")
        family = self._refresh_tokens.get(presented)
        if family is None or family.revoked:
            return _error(400, "invalid_grant")
        if presented != family.refresh_token:
            family.revoked = True
            self._reuses += 1
            return _error(400, "invalid_grant")
        return _json(200, self._tokens(family))

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

    def _authorize(self, query: Mapping[str, str]) -> _Answer:
        redirect_uri = query.get("redirect_uri", "")
        known = query.get("client_id") == self.client_id and urlsplit(redirect_uri).hostname in {"127.0.0.1", "::1"}
        if not known or query.get("code_challenge_method") != "S256":
            return _error(400, "invalid_request")
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
        return _Answer(302, b"", {"Location": f"{redirect_uri}?{urlencode(reply)}"})

    def _redeem_code(self, form: Mapping[str, str]) -> _Answer:
        grant = self._grants.get(form.get("code", ""))
        if grant is None or grant.user_code:
            return _error(400, "invalid_grant")
        del self._grants[form["code"]]
        verifier = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(verifier).rstrip(b"=").decode()
        right = (grant.challenge, grant.redirect_uri) == (challenge, form.get("redirect_uri"))
        if not right or grant.expires_at < self._clock():
            return _error(400, "invalid_grant")
        return self._begin_session(grant)

    def _begin_session(self, grant: _Grant) -> _Answer:
        family = _Family(grant.client_id, grant.scope, grant.nonce)
        self._families.append(family)
        return _json(200, self._tokens(family, refreshable="offline_access" in grant.scope.split()))

    def _device_authorization(self, form: Mapping[str, str], authorization: str | None) -> _Answer:
        if not self._client_is_known(form, authorization):
            return _error(401, "invalid_client")
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
        answer = {
            "device_code": device_code,
            "user_code": user_code,
            "verification_uri": f"{self.issuer}/device",
            "verification_uri_complete": f"{self.issuer}/device?user_code={user_code}",
            "expires_in": 300,
        }
        return _json(200, answer if self.device_interval is None else {**answer, "interval": self.device_interval})

    def _redeem_device_code(self, form: Mapping[str, str]) -> _Answer:
        grant = self._grants.get(form.get("device_code", ""))
        if grant is None or not grant.user_code:
            return _error(400, "invalid_grant")
        if grant.expires_at < self._clock():
            return _error(400, "expired_token")
        if grant.state == "pending":
            # Not the issuer's clock: a client waits in real time, whatever a test makes of expiries.
            now = time.monotonic()
            too_early, grant.polled_at = now < grant.polled_at + grant.interval, now
            if too_early:
                grant.interval += _SLOW_DOWN_SECONDS
            return _error(400, "slow_down" if too_early else "authorization_pending")
        del self._grants[form["device_code"]]
        return self._begin_session(grant) if grant.state == "approved" else _error(400, "access_denied")

    def _revoke(self, token: str) -> _Answer:
        with self._lock:
            family = self._refresh_tokens.get(token)
            if family is not None:
                family.revoked = True
            else:
                # RFC 7009 section 2.2: revoking what is no token, or no access token, is no error.
                with suppress(TokenRefused, KeyError):
                    self._revoked.add(self._claims(token)["jti"])
        return _Answer(200, b"")


_INTERVAL_SECONDS: Final = 5.0  # RFC 8628 section 3.2
_SLOW_DOWN_SECONDS: Final = 5.0  # section 3.5
_DISCOVERY: Final = {"/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"}


@cache
def _signing_key(number: int) -> RSAKey:
    # Generating one takes a tenth of a second, so that all issuers of a process share them.
    return RSAKey.generate_key(2048, parameters={"kid": f"key-{number}", "use": "sig", "alg": "RS256"})


def _unverified(access_token: str) -> dict[str, Any]:
    payload = access_token.split(".")[1]
    return cast("dict[str, Any]", json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))))


def _json(status: int, content: Mapping[str, Any]) -> _Answer:
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    return _Answer(status, json.dumps(content).encode(), headers)


def _error(status: int, error: str) -> _Answer:
    return _json(status, {"error": error})


class _Server(ThreadingMixIn, TCPServer):
    # Not http.server's, which looks its own name up in the DNS.
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, issuer: FakeIssuer, port: int) -> None:
        self.issuer = issuer
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Breaks the connections that clients keep alive."""
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are none of our business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        server = cast("_Server", self.server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = server.issuer._handle(self.command, self.path, body, self.headers.get("Authorization"))  # noqa: SLF001
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = _answer  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
        """Tests have output enough."""

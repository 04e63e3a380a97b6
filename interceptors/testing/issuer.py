"""A real OpenID issuer on loopback, in a thread, that can be made to fail in every way that issuers fail."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import parse_qs, urlsplit

from interceptors.testing.authority import DEVICE_GRANT, Authority, TokenRefused
from interceptors.testing.loopback import Answer, LoopbackServer, json_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

__all__ = ["DEVICE_GRANT", "FakeIssuer", "IssuerRequest", "TokenRefused"]


@dataclass(frozen=True)
class IssuerRequest:
    """A request that the issuer has received."""

    path: str
    grant_type: str | None
    status: int
    at: float


class FakeIssuer(Authority):
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
        super().__init__(
            access_token_lifetime=access_token_lifetime,
            rotate=rotate,
            audience=audience,
            client_id=client_id,
            client_secret=client_secret,
            auto_approve=auto_approve,
            clock=clock,
        )
        self.requests: list[IssuerRequest] = []
        """Every request that was answered, oldest first."""
        self.delay = 0.0
        """Seconds before a token request is answered."""
        self._open = threading.Event()
        self._open.set()
        self._arrived = threading.Condition(self._lock)
        self._arrivals = 0
        self._scripted: list[tuple[str, Answer]] = []
        self._server: LoopbackServer | None = None

    # Running

    def start(self) -> Self:
        """Starts to serve; the port stays the same over a `stop`."""
        with self._lock:
            if self._server is None:
                self._server = LoopbackServer(self._handle, self._port)
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
            self._scripted += [(path, Answer(status, content, headers))] * times

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

    def wait_for_token_requests(self, count: int, timeout: float = 10.0) -> None:
        """Waits until `count` token requests have arrived, answered or not, since the issuer was made.

        Raises:
            TimeoutError: They did not arrive within `timeout` seconds.
        """
        with self._lock:
            if not self._arrived.wait_for(lambda: self._arrivals >= count, timeout):
                msg = f"{self._arrivals} token requests arrived within {timeout:g} s, not {count}"
                raise TimeoutError(msg)

    # Answering

    def _handle(self, method: str, target: str, body: bytes, authorization: str | None) -> Answer:
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
                answer = self.token(form, authorization)
        elif method == "GET" and parts.path in _DISCOVERY:
            answer = json_answer(200, self.metadata())
        elif method == "GET" and parts.path == "/jwks":
            answer = json_answer(200, self.published_keys())
        elif method == "GET" and parts.path == "/authorize":
            answer = self.authorize({name: values[0] for name, values in parse_qs(parts.query).items()})
        elif method == "POST" and parts.path == "/device_authorization":
            answer = self.device_authorization(form, authorization)
        elif method == "POST" and parts.path == "/revoke":
            answer = self.revocation(form.get("token", ""))
        else:
            answer = json_answer(404, {})
        with self._lock:
            self.requests.append(IssuerRequest(parts.path, grant_type, answer.status, self._clock()))
        return answer

    def _next_scripted(self, path: str) -> Answer | None:
        with self._lock:
            for index, (of, answer) in enumerate(self._scripted):
                if of == path:
                    del self._scripted[index]
                    return answer
        return None


_DISCOVERY: Final = {"/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"}

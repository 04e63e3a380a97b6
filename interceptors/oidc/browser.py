"""A login in the system browser: authorization code and PKCE, answered on a loopback port (RFC 8252, RFC 7636)."""

from __future__ import annotations

import hmac
import secrets
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, cast
from urllib.parse import parse_qs, urlsplit

from interceptors.errors import LOGIN_HINT, AuthError, LoginRequired, RefreshError
from interceptors.oidc import pages
from interceptors.oidc.answers import PASSING, error_code
from interceptors.waiting import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from interceptors.oidc.discovery import Metadata
    from interceptors.session import Session

_CALLBACK: Final = "/callback"
_CONNECTION_SECONDS: Final = 10.0  # after which a connection that says nothing is dropped
_FAREWELL_SECONDS: Final = 2.0  # for the last page to reach the browser
_PARAMETERS_AT_MOST: Final = 50
# RFC 6749 section 4.1.2.1 and OpenID Connect Core section 3.1.2.6: what the person decided, or has still to do.
_PERSONAL: Final = frozenset(
    {"access_denied", "login_required", "consent_required", "interaction_required", "account_selection_required"}
)


@dataclass(frozen=True)
class Redeemable:
    """An authorization code, with all that is needed to get a session for it."""

    code: str
    redirect_uri: str
    verifier: str
    nonce: str


def login_in_browser(
    metadata: Metadata,
    client_id: str,
    scope: str,
    *,
    open_browser: Callable[[str], object],
    timeout: float,
    redeem: Callable[[Redeemable], Session],
) -> Session:
    """The session that a person's login in the browser yields.

    The address is printed on stderr as well, for machines on which no browser opens.

    Args:
        metadata: Of the issuer.
        client_id: The client that asks.
        scope: What it asks for.
        open_browser: Is called with the address, on a thread of its own, so that it may take its time.
        timeout: Seconds that the person has.
        redeem: Gets the session for the code; the browser shows its outcome.

    Raises:
        LoginRequired: The person has refused, or was not done in time.
        RefreshError: The issuer has a problem that may pass.
        AuthError: The issuer refuses the client, or its answer is not to be trusted.
    """
    from authlib.common.security import generate_token
    from authlib.oauth2.rfc6749.parameters import prepare_grant_uri
    from authlib.oauth2.rfc7636 import create_s256_code_challenge

    if metadata.authorization_endpoint is None:
        msg = f'{metadata.issuer} offers no login in a browser: try "interceptors login --device"'
        raise AuthError(msg)
    state, nonce, verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(32), generate_token(64)
    with LoopbackRedirect(state) as redirect:
        address = prepare_grant_uri(
            metadata.authorization_endpoint,
            client_id,
            "code",
            redirect_uri=redirect.uri,
            scope=scope,
            state=state,
            nonce=nonce,
            code_challenge=create_s256_code_challenge(verifier),
            code_challenge_method="S256",
            # OpenID Connect Core section 11: without it issuers ignore offline_access.
            prompt="consent" if "offline_access" in scope.split() else None,
        )
        _invite(address, open_browser)
        try:
            answer = redirect.wait(timeout)
            session = redeem(Redeemable(_code(answer, metadata), redirect.uri, verifier, nonce))
        except AuthError as error:
            redirect.show(pages.failure(str(error)))
            raise
        redirect.show(pages.success())
        return session


def _invite(address: str, open_browser: Callable[[str], object]) -> None:
    # Printed in any case: a browser that was started need not be one that the person can see.
    _tell(f"Log in with your browser. If none opens, visit\n\n  {address}\n")

    def attempt() -> None:
        try:
            opened, why = open_browser(address) is not False, ""
        except Exception as error:  # noqa: BLE001 - the person has the address
            opened, why = False, f" ({type(error).__name__})"
        if not opened:
            _tell(f"No browser could be opened{why}: visit the address above.")

    threading.Thread(target=attempt, name="interceptors-browser", daemon=True).start()


def _tell(text: str) -> None:
    if sys.stderr is not None:  # there is none under pythonw
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one thing that a person has to see


def _code(answer: Mapping[str, str], metadata: Metadata) -> str:
    # RFC 9207 section 2.4: another issuer's answer, also one that is an error, must not be used.
    if answer.get("iss", None if metadata.sends_iss else metadata.issuer) != metadata.issuer:
        msg = (
            f"the answer in the browser does not come from {metadata.issuer} (iss): do not go on, and {LOGIN_HINT} anew"
        )
        raise AuthError(msg)
    if "error" in answer:
        _refused(error_code(answer["error"]), metadata.issuer)
    return answer["code"]


def _refused(error: str, issuer: str) -> NoReturn:
    if error in _PERSONAL:
        msg = f"the login at {issuer} was refused in the browser ({error}): {LOGIN_HINT} to try again"
        raise LoginRequired(msg)
    if error in PASSING:
        msg = f"{issuer} cannot log anybody in just now ({error}): {LOGIN_HINT} again later"
        raise RefreshError(msg)
    msg = f"{issuer} refused to begin the login ({error}): check how the client is registered there, and its scopes"
    raise AuthError(msg)


class LoopbackRedirect:
    """Waits on a free loopback port for the one request that answers a login, whatever else comes in.

    Args:
        state: What the answer must bring along (RFC 6749 section 10.12).
    """

    def __init__(self, state: str) -> None:
        self._state = state
        self._answer: Future[dict[str, str]] = Future()
        self._page: Future[pages.Page] = Future()
        self._showing = 0
        self._shown = threading.Condition()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.redirect = self
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}{_CALLBACK}"

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="interceptors-login", daemon=True
        ).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        settle(self._page, pages.failure("the login was broken off"))
        with self._shown:
            self._shown.wait_for(lambda: not self._showing, _FAREWELL_SECONDS)
        self._server.shutdown()
        self._server.server_close()

    def wait(self, timeout: float) -> dict[str, str]:
        """The parameters of the answer: `code` or `error`, perhaps `iss`.

        Raises:
            LoginRequired: It did not come within `timeout` seconds.
        """
        try:
            return self._answer.result(timeout)
        except TimeoutError:
            msg = f"nobody has logged in within {timeout:g} s: {LOGIN_HINT} again"
            raise LoginRequired(msg) from None

    def show(self, page: pages.Page) -> None:
        """Ends the login with this page."""
        settle(self._page, page)

    def page_for(self, target: str) -> pages.Page:
        """The page for a GET of `target`; for the login's answer it waits until it is known how the login ended."""
        parts = urlsplit(target)
        if parts.path != _CALLBACK:
            return pages.not_found()
        try:
            query = parse_qs(parts.query, keep_blank_values=True, max_num_fields=_PARAMETERS_AT_MOST)
        except ValueError:
            return pages.stray()
        # RFC 6749 section 3.1: a parameter must not come twice.
        answer = {name: values[0] for name, values in query.items() if len(values) == 1}
        ours = hmac.compare_digest(answer.get("state", "").encode(), self._state.encode())
        if not ours or ("code" in answer) == ("error" in answer):
            return pages.stray()
        settle(self._answer, answer)
        # Whoever comes with the same answer again, a reloading browser, sees the same page.
        return self._page.result()

    def showing(self, change: int) -> None:
        """Counts the requests that are being answered, so that the last page is not cut off."""
        with self._shown:
            self._showing += change
            self._shown.notify_all()


class _Server(ThreadingMixIn, TCPServer):
    # Not http.server's, which looks its own name up in the DNS and lets others share its port on Windows.
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16
    redirect: LoopbackRedirect

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is none of the login's business."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _CONNECTION_SECONDS
    server_version = "interceptors"
    sys_version = ""

    def do_GET(self) -> None:
        redirect = cast("_Server", self.server).redirect
        redirect.showing(1)
        try:
            page = redirect.page_for(self.path)
            self.send_response(page.status)
            for name, value in pages.HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(page.body)))
            self.end_headers()
            self.wfile.write(page.body)
        finally:
            redirect.showing(-1)

    def _not_allowed(self) -> None:
        # A program that looks before the browser does must not use up the answer.
        self.send_response(405)
        self.send_header("Allow", "GET")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_PUT = do_OPTIONS = _not_allowed  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
        """The address of the answer holds the code: nothing is logged."""

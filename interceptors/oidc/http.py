"""Requests to an issuer: bounded in time and size, without redirects, with one kind of error."""

from __future__ import annotations

import ipaddress
import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from interceptors.errors import RefreshError
from interceptors.timelimit import in_time

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping

    import httpx

OK: Final = 200
UNAUTHORIZED: Final = 401

_SIZE_LIMIT: Final = 1024 * 1024
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "interceptors"}
_TOO_MANY_REQUESTS: Final = 429
_SERVER_ERRORS: Final = 500


class NotNow(RefreshError):  # noqa: N818 - it says what happened
    """The issuer has not dealt with the request, and may later."""


class Unreachable(NotNow):
    """There was no answer at all: nobody knows whether the request arrived."""


@dataclass(frozen=True)
class Response:
    """An issuer's answer. `content` is what its JSON says, None if it is no JSON object."""

    status: int
    content: dict[str, Any] | None
    retry_after: float | None

    @property
    def is_success(self) -> bool:
        """Whether the status says that what was asked for is done."""
        return self.status // 100 == OK // 100


def request(
    method: str,
    url: str,
    *,
    timeout: float,
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One exchange with an issuer, at most `timeout` seconds in all, however slowly the bytes come.

    Raises:
        Unreachable: There was no answer in time.
        NotNow: The answer says to try again later (429, 5xx).
        RefreshError: The answer is too large, or `url` cannot be asked.
    """
    connections: list[socket.socket] = []
    all_headers = {**_HEADERS, **(headers or {})}
    try:
        # httpx bounds each read, not their sum.
        response = in_time(
            lambda: _exchange(method, url, timeout, body, all_headers, connections), timeout, "interceptors-http"
        )
    except TimeoutError:
        for connection in connections:
            # It wakes the thread. Closing would free the descriptor's number while the thread still reads from it.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        msg = f"{_place(url)} did not answer within {timeout:g} s: check the network, or whether the issuer is up"
        raise Unreachable(msg) from None
    if response.status == _TOO_MANY_REQUESTS or response.status >= _SERVER_ERRORS:
        msg = f"{_place(url)} answered HTTP {response.status}: try again later"
        raise NotNow(msg, retry_after=response.retry_after)
    return response


def _exchange(
    method: str,
    url: str,
    timeout: float,
    body: str | None,
    headers: dict[str, str],
    connections: list[socket.socket],
) -> Response:
    import httpx

    def trace(event: str, info: dict[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            if connection is not None:
                connections.append(connection)

    deadline = time.monotonic() + timeout
    # A proxy has no business between us and loopback, where the transport is not encrypted.
    trust_env = not is_loopback(url)
    try:
        with (
            _client(timeout, trust_env=trust_env) as client,
            client.stream(method, url, content=body, headers=headers, extensions={"trace": trace}) as response,
        ):
            content = b"".join(_bounded(response, deadline))
            return Response(response.status_code, _json_object(content), _retry_after(response))
    except httpx.InvalidURL:
        msg = f"{_place(url)} is not a URL that can be asked"
        raise RefreshError(msg) from None
    except httpx.HTTPError as error:
        # The exception holds the request, and that may hold a secret; what the system said does not.
        msg = (
            f"{_place(url)} cannot be reached ({type(error).__name__}): check the network, or whether the issuer is up"
        )
        raise Unreachable(msg) from _said_by_the_system(error)


def _client(timeout: float, *, trust_env: bool) -> httpx.Client:
    import httpx

    # What the environment says may hold a proxy's password: it is named, and not shown.
    try:
        return httpx.Client(verify=_tls(), timeout=timeout, follow_redirects=False, trust_env=trust_env)
    except OSError as error:
        why = error.strerror or type(error).__name__
        msg = f"the certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read ({why}): correct or unset it"
    except ImportError:
        msg = "the proxy that HTTPS_PROXY or ALL_PROXY names speaks SOCKS: pip install httpx[socks], or name another"
    except (ValueError, httpx.InvalidURL):
        msg = "the proxy that HTTPS_PROXY or ALL_PROXY names is no http://HOST:PORT: correct or unset it"
    raise RefreshError(msg)


def _said_by_the_system(error: BaseException) -> OSError | None:
    """What led to `error`, if it is the system's word: a refused connection, an unknown host, a bad certificate."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else cause.with_traceback(None)


@cache
def _tls() -> ssl.SSLContext:
    # Reading all root certificates takes tens of milliseconds.
    import httpx

    return httpx.create_ssl_context()


def _bounded(response: httpx.Response, deadline: float) -> Iterator[bytes]:
    size = 0
    for chunk in response.iter_raw():
        size += len(chunk)
        if size > _SIZE_LIMIT:
            msg = f"{_place(str(response.url))} answered with more than {_SIZE_LIMIT} bytes: is it an OpenID issuer?"
            raise RefreshError(msg)
        if time.monotonic() > deadline:
            return
        yield chunk


def _json_object(content: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _retry_after(response: httpx.Response) -> float | None:
    from email.utils import parsedate_to_datetime

    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def _place(url: str) -> str:
    """Where a request went, without the query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def is_loopback(url: str) -> bool:
    """Whether the host of `url` is this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_secure(url: object) -> bool:
    """Whether secrets may be sent to `url`: https, or http on loopback."""
    if not isinstance(url, str) or any(ord(character) <= ord(" ") for character in url):
        return False
    try:
        parts = urlsplit(url)
        _ = parts.port
        return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(url)))
    except ValueError:
        return False

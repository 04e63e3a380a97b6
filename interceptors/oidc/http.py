"""Requests to an issuer: bounded in time and size, without redirects, with one kind of error."""

from __future__ import annotations

import email.utils
import ipaddress
import json
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from interceptors.errors import RefreshError
from interceptors.waiting import settle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx

_SIZE_LIMIT: Final = 1024 * 1024
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "interceptors"}
_TOO_MANY_REQUESTS: Final = 429
_SERVER_ERRORS: Final = 500


@dataclass(frozen=True)
class Response:
    """An issuer's answer. `content` is what its JSON says, None if it is no JSON object."""

    status: int
    content: dict[str, Any] | None
    retry_after: float | None


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
        RefreshError: There was no answer, or one that says to try again later (429, 5xx).
    """
    answer: Future[Response] = Future()

    def exchange() -> None:
        try:
            answer.set_result(_exchange(method, url, timeout, body, {**_HEADERS, **(headers or {})}))
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is awaited
            settle(answer, error)

    # httpx bounds each read, not their sum; so the exchange has a thread that can be left behind.
    threading.Thread(target=exchange, name="interceptors-http", daemon=True).start()
    try:
        response = answer.result(timeout)
    except TimeoutError:
        msg = f"{_place(url)} did not answer within {timeout:g} s: check the network, or whether the issuer is up"
        raise RefreshError(msg) from None
    if response.status == _TOO_MANY_REQUESTS or response.status >= _SERVER_ERRORS:
        msg = f"{_place(url)} answered HTTP {response.status}: try again later"
        raise RefreshError(msg, retry_after=response.retry_after)
    return response


def _exchange(method: str, url: str, timeout: float, body: str | None, headers: dict[str, str]) -> Response:
    import httpx

    deadline = time.monotonic() + timeout
    try:
        with (
            # A proxy has no business between us and loopback, where the transport is not encrypted.
            httpx.Client(timeout=timeout, follow_redirects=False, trust_env=not is_loopback(url)) as client,
            client.stream(method, url, content=body, headers=headers) as response,
        ):
            content = b"".join(_bounded(response, deadline))
            return Response(response.status_code, _json_object(content), _retry_after(response))
    except httpx.InvalidURL as error:
        msg = f"{_place(url)} is not a URL that can be asked ({error})"
        raise RefreshError(msg) from None
    except httpx.HTTPError as error:
        # The exception holds the request, and that may hold a secret; its name says enough.
        msg = (
            f"{_place(url)} cannot be reached ({type(error).__name__}): check the network, or whether the issuer is up"
        )
        raise RefreshError(msg) from None


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
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
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

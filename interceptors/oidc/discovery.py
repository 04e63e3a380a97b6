"""What an issuer says of itself: OpenID Connect Discovery, else RFC 8414, believed only where it is safe to."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from interceptors.errors import RefreshError
from interceptors.oidc import http

_ENDPOINTS: Final = (
    "authorization_endpoint",
    "token_endpoint",
    "jwks_uri",
    "revocation_endpoint",
    "device_authorization_endpoint",
)


@dataclass(frozen=True)
class Metadata:
    """An issuer's endpoints and abilities; None for what it does not have."""

    issuer: str
    token_endpoint: str
    authorization_endpoint: str | None = None
    jwks_uri: str | None = None
    revocation_endpoint: str | None = None
    device_authorization_endpoint: str | None = None
    token_endpoint_auth_methods: tuple[str, ...] = ("client_secret_basic",)
    id_token_algorithms: tuple[str, ...] = ("RS256",)
    sends_iss: bool = False


def discover(issuer: str, timeout: float) -> Metadata:
    """The metadata of `issuer`.

    Raises:
        RefreshError: There is none, or none that may be believed; the message says what was expected.
    """
    for url in _locations(issuer):
        response = http.request("GET", url, timeout=timeout)
        # Where there is nothing, a web application may answer with its own page.
        if response.status == http.OK and response.content is not None:
            return _checked(response.content, issuer, url)
    msg = (
        f"{issuer} has no discovery document, a JSON object, at {' or '.join(_locations(issuer))}: "
        "check the issuer's URL, it must be exactly the one that the provider names"
    )
    raise RefreshError(msg)


def _locations(issuer: str) -> tuple[str, str]:
    parts = urlsplit(issuer)
    path = parts.path.rstrip("/")
    # OpenID Connect Discovery appends to the issuer's path, RFC 8414 section 3.1 puts its own in front of it.
    return (
        urlunsplit((parts.scheme, parts.netloc, f"{path}/.well-known/openid-configuration", "", "")),
        urlunsplit((parts.scheme, parts.netloc, f"/.well-known/oauth-authorization-server{path}", "", "")),
    )


def _checked(content: dict[str, Any], issuer: str, url: str) -> Metadata:
    if content.get("issuer") != issuer:
        # RFC 8414 section 3.3: another issuer's document must not be used.
        named = reprlib.repr(content.get("issuer"))
        msg = f"the discovery document {url} names the issuer {named}, expected {issuer!r}"
        raise RefreshError(msg)
    # An empty one is none.
    endpoints = {name: content[name] for name in _ENDPOINTS if content.get(name)}
    for name, endpoint in endpoints.items():
        if not http.is_secure(endpoint):
            named = reprlib.repr(endpoint)
            msg = f"the discovery document {url} names the {name} {named}, expected an https URL (http on loopback)"
            raise RefreshError(msg)
    if "token_endpoint" not in endpoints:
        msg = f"the discovery document {url} names no token_endpoint"
        raise RefreshError(msg)
    return Metadata(
        issuer=issuer,
        **endpoints,
        token_endpoint_auth_methods=_strings(
            content.get("token_endpoint_auth_methods_supported"), ("client_secret_basic",)
        ),
        id_token_algorithms=_strings(content.get("id_token_signing_alg_values_supported"), ("RS256",)),
        sends_iss=content.get("authorization_response_iss_parameter_supported") is True,
    )


def _strings(value: object, default: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value) and value:
        return tuple(value)
    return default

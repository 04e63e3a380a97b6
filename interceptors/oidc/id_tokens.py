"""Id tokens: checked by OpenID Connect Core section 3.1.3.7 against the issuer's keys, which may rotate."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from interceptors.errors import RefreshError
from interceptors.oidc import http

if TYPE_CHECKING:
    from joserfc.jwk import KeySet

    from interceptors.oidc.discovery import Metadata

_LEEWAY_SECONDS: Final = 60.0
_OK: Final = 200
# Signatures that need the issuer's private key: never "none", never a shared secret.
_ALGORITHMS: Final = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)


class KeysUnavailable(RefreshError):  # noqa: N818 - it says what happened
    """The issuer's keys could not be fetched: nothing is known of the id token."""


class IdTokenChecker:
    """Checks the id tokens of one client.

    Args:
        metadata: Of the issuer.
        client_id: For whom they must be.
        timeout: The longest that fetching the keys may take, in seconds.
    """

    def __init__(self, metadata: Metadata, client_id: str, timeout: float) -> None:
        self._metadata = metadata
        self._client_id = client_id
        self._timeout = timeout
        self._keys: KeySet | None = None

    def claims(self, id_token: str, *, nonce: str | None = None) -> dict[str, Any]:
        """The claims of `id_token`.

        Raises:
            RefreshError: It is not to be believed.
            KeysUnavailable: The keys cannot be had.
        """
        from joserfc import jwt
        from joserfc.errors import BadSignatureError, InvalidKeyIdError, JoseError

        algorithms = [name for name in self._metadata.id_token_algorithms if name in _ALGORITHMS] or ["RS256"]
        for fresh in (False, True):
            keys = self._key_set(fresh=fresh)
            try:
                claims = jwt.decode(id_token, keys, algorithms=algorithms).claims
            except (InvalidKeyIdError, BadSignatureError, KeyError) as error:
                if fresh:
                    why = f"its signature is not the issuer's ({type(error).__name__})"
                    raise self._refused(why) from None
                # The issuer may have a new key: ask once.
            except (JoseError, ValueError, TypeError) as error:
                why = f"it cannot be decoded ({type(error).__name__})"
                raise self._refused(why) from None
            else:
                self._check(claims, nonce)
                return dict(claims)
        raise AssertionError

    def _check(self, claims: dict[str, Any], nonce: str | None) -> None:
        now = time.time()
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        expires_at, issued_at = claims.get("exp"), claims.get("iat")
        if claims.get("iss") != self._metadata.issuer:
            raise self._refused("it is another issuer's")
        if self._client_id not in audiences or (len(audiences) > 1 and claims.get("azp") != self._client_id):
            raise self._refused("it is for another client")
        if claims.get("azp") not in {None, self._client_id}:
            raise self._refused("it is for another client")
        if not isinstance(expires_at, (int, float)) or expires_at < now - _LEEWAY_SECONDS:
            raise self._refused("it has expired; check this machine's clock")
        if isinstance(issued_at, (int, float)) and issued_at > now + _LEEWAY_SECONDS:
            raise self._refused("it is from the future; check this machine's clock")
        if not isinstance(claims.get("sub"), str) or not claims["sub"]:
            raise self._refused("it names no subject")
        if nonce is not None and claims.get("nonce") != nonce:
            raise self._refused("it belongs to another login (nonce)")

    def _key_set(self, *, fresh: bool) -> KeySet:
        from joserfc.errors import JoseError
        from joserfc.jwk import KeySet

        if self._keys is None or fresh:
            uri = self._metadata.jwks_uri
            if uri is None:
                raise self._refused("the issuer publishes no keys (jwks_uri)")
            try:
                response = http.request("GET", uri, timeout=self._timeout)
            except RefreshError as error:
                raise KeysUnavailable(str(error)) from error
            try:
                if response.status != _OK or response.content is None:
                    raise ValueError
                self._keys = KeySet.import_key_set(response.content)  # type: ignore[arg-type]
            except (JoseError, ValueError, TypeError, KeyError):
                msg = f"the issuer's keys at {uri} cannot be read"
                raise KeysUnavailable(msg) from None
        return self._keys

    def _refused(self, why: str) -> RefreshError:
        return RefreshError(f"the id token from {self._metadata.issuer} is not valid: {why}")

"""Id tokens: checked by OpenID Connect Core section 3.1.3.7 against the issuer's keys, which may rotate."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from interceptors.errors import RefreshError
from interceptors.oidc import http

if TYPE_CHECKING:
    from collections.abc import Callable

    from joserfc.jwk import KeySet

    from interceptors.oidc.discovery import Metadata

_LEEWAY_SECONDS: Final = 60
# Until a refreshed session is saved, it may be lost: its id token is not worth a long wait, nor one at each refresh.
_HASTE_SECONDS: Final = 2.0
_GIVEN_UP_SECONDS: Final = 300.0
# Signatures that need the issuer's private key: never "none", never a shared secret.
_ALGORITHMS: Final = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"}
)


class KeysUnavailable(RefreshError):  # noqa: N818 - it says what happened
    """The issuer's keys could not be fetched, or lack the one that is needed: nothing is known of the id token."""


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
        self._given_up_at = -math.inf

    def at_login(self, id_token: str, *, nonce: str | None) -> dict[str, Any]:
        """The claims of the id token that a login has yielded.

        Args:
            id_token: As received.
            nonce: What the login sent along; None if it had none.

        Raises:
            RefreshError: The id token is not to be believed.
            KeysUnavailable: The issuer's keys cannot be had.
        """
        claims = self._signed_claims(id_token, self._fetched_keys)
        self._check(claims, _LEEWAY_SECONDS)
        if nonce is not None and claims.get("nonce") != nonce:
            raise self._refused("it belongs to another login (nonce)")
        return claims

    def at_refresh(self, id_token: str, *, subject: str | None) -> dict[str, Any]:
        """The claims of an id token that came with a refresh (OpenID Connect Core section 12.2).

        Its times are not looked at. It came straight from the issuer, and to refuse it would be to lose the session,
        as its old refresh token is spent: a machine whose clock lags after a sleep must not end a session.

        Args:
            id_token: As received.
            subject: Whom the session is about; None if that is not known.

        Raises:
            RefreshError: The id token is not to be believed.
            KeysUnavailable: The issuer's keys cannot be had.
        """
        claims = self._signed_claims(id_token, self._keys_in_haste)
        self._check(claims, sys.maxsize)
        if subject is not None and claims["sub"] != subject:
            raise self._refused("it is about another subject than the session")
        return claims

    def _signed_claims(self, id_token: str, fetch: Callable[[], KeySet]) -> dict[str, Any]:
        from joserfc.errors import BadSignatureError, InvalidKeyIdError

        algorithms = [name for name in self._metadata.id_token_algorithms if name in _ALGORITHMS] or ["RS256"]
        for fresh in (True,) if self._keys is None else (False, True):
            keys = fetch() if fresh or self._keys is None else self._keys
            try:
                return _decoded(id_token, keys, algorithms)
            except (InvalidKeyIdError, BadSignatureError) as error:
                # The issuer may have a new key: ask once.
                if not fresh:
                    continue
                if isinstance(error, InvalidKeyIdError):
                    # What has been signed with a new key may be seen before the key is.
                    msg = f"{self._metadata.issuer} does not publish the key of its id token yet: try again in a moment"
                    raise KeysUnavailable(msg) from None
                raise self._refused("its signature is not the issuer's") from None
            except Exception as error:  # noqa: BLE001 - libraries trip over rubbish each in its own way
                why = f"it cannot be decoded ({type(error).__name__})"
                raise self._refused(why) from None
        raise AssertionError

    def _check(self, claims: dict[str, Any], leeway: int) -> None:
        from joserfc.errors import ExpiredTokenError, JoseError
        from joserfc.jwt import JWTClaimsRegistry

        registry = JWTClaimsRegistry(
            leeway=leeway,
            iss={"essential": True, "value": self._metadata.issuer},
            sub={"essential": True},
            aud={"essential": True, "value": self._client_id},
            exp={"essential": True},
        )
        try:
            registry.validate(claims)
        except ExpiredTokenError:
            raise self._refused("it has expired; check this machine's clock") from None
        except JoseError as error:
            claim = getattr(error, "claim", None)
            hint = "; check this machine's clock" if claim in {"iat", "nbf"} else ""
            why = f"its {claim or 'content'} is missing or wrong{hint}"
            raise self._refused(why) from None
        # Sections 2 and 3.1.3.7: who asked for it, which must be said when it is for several.
        audience = claims["aud"]
        several = isinstance(audience, list) and len(audience) > 1
        if claims.get("azp", None if several else self._client_id) != self._client_id:
            raise self._refused("it was made for another client (azp)")

    def _keys_in_haste(self) -> KeySet:
        if time.monotonic() - self._given_up_at < _GIVEN_UP_SECONDS:
            msg = f"the keys of {self._metadata.issuer} could not be fetched a moment ago: try again later"
            raise KeysUnavailable(msg)
        try:
            return self._fetched_keys(min(self._timeout, _HASTE_SECONDS))
        except KeysUnavailable:
            self._given_up_at = time.monotonic()
            raise

    def _fetched_keys(self, timeout: float | None = None) -> KeySet:
        uri = self._metadata.jwks_uri
        if uri is None:
            msg = f"{self._metadata.issuer} publishes no keys (jwks_uri)"
            raise KeysUnavailable(msg)
        try:
            response = http.request("GET", uri, timeout=timeout or self._timeout)
        except RefreshError as error:
            raise KeysUnavailable(str(error), retry_after=error.retry_after) from error
        keys = _usable_keys(response.content or {}) if response.status == http.OK else None
        if not keys:
            msg = f"the issuer's keys at {uri} cannot be read"
            raise KeysUnavailable(msg)
        self._keys = keys
        return keys

    def _refused(self, why: str) -> RefreshError:
        return RefreshError(f"the id token from {self._metadata.issuer} is not valid: {why}")


def _decoded(id_token: str, keys: KeySet, algorithms: list[str]) -> dict[str, Any]:
    from joserfc import jwt
    from joserfc.errors import UnsupportedAlgorithmError
    from joserfc.jwk import KeySet
    from joserfc.jws import CompactSignature, JWSRegistry

    class Registry(JWSRegistry):
        def get_alg(self, name: str) -> Any:
            # joserfc's own warns of EdDSA, which is the issuer's choice, and where warnings are errors would refuse it.
            if name not in algorithms:
                raise UnsupportedAlgorithmError(name)
            return self.algorithms[name]

    def of_its_kind(signature: CompactSignature) -> KeySet:
        # RFC 7517 section 4.5: keys of different types may have the same id.
        kinds = KeySet.algorithm_keys[signature.headers()["alg"]]
        return KeySet([key for key in keys if key.key_type in kinds])

    return dict(jwt.decode(id_token, of_its_kind, registry=Registry()).claims)  # type: ignore[arg-type]


def _usable_keys(content: dict[str, Any]) -> KeySet | None:
    from joserfc.jwk import JWKRegistry, KeySet

    published = content.get("keys")
    keys = []
    for key in published if isinstance(published, list) else []:
        # RFC 7517 section 5: keys of a kind that is not known are not ours to mind.
        try:
            if key.get("use", "sig") == "sig" and key.get("kty") != "oct":
                keys.append(JWKRegistry.import_key(key))
        except Exception:  # noqa: BLE001, S112 - libraries trip over rubbish each in its own way
            continue
    return KeySet(keys) if keys else None

"""The short way from a stored login to a token source."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from interceptors.errors import LOGIN_HINT, LoginRequired

if TYPE_CHECKING:
    from collections.abc import Callable

    from interceptors.refreshing import RefreshingTokenSource
    from interceptors.session import Session
    from interceptors.stores.base import SessionStore

_WINDOW: Final = timedelta(minutes=15)


def open_session(
    issuer: str,
    client_id: str,
    *,
    store: SessionStore | None = None,
    client_secret: str | None = None,
    window: timedelta = _WINDOW,
    on_refresh: Callable[[Session], object] | None = None,
    timeout: float = 10.0,
) -> RefreshingTokenSource:
    """The token source over the session that `interceptors login` has stored. Makes no request yet.

    Args:
        issuer: The OpenID issuer, as for `OidcClient`.
        client_id: The client that has logged in.
        store: Where the session is kept; the system keyring's profile "default" if None.
        client_secret: Only for confidential clients.
        window: How long before its expiry a token is refreshed; see `RefreshingTokenSource`.
        on_refresh: Called after each refresh; `announce_refresh`, for example. See `RefreshingTokenSource`.
        timeout: The longest that one request to the issuer may take, in seconds.

    Raises:
        LoginRequired: No session is stored, or one of another issuer or client.
        StoreError: The store cannot be read.
        TypeError, ValueError: An argument is not what it should be.
    """
    from interceptors.oidc.client import OidcClient
    from interceptors.refreshing import RefreshingTokenSource

    client = OidcClient(issuer, client_id, client_secret=client_secret, timeout=timeout)
    if store is None:
        from interceptors.stores.keyring import KeyringStore

        store = KeyringStore()
    source = RefreshingTokenSource(store, client.refresh, window=window, on_refresh=on_refresh)
    session = store.load()
    if session is None:
        msg = f"no session is stored in {store}: {LOGIN_HINT}"
        raise LoginRequired(msg)
    owner = (session.issuer or issuer, session.client_id or client_id)
    if owner != (issuer, client_id):
        msg = (
            f"the session in {store} belongs to client {owner[1]} at {owner[0]}, not to client {client_id} at "
            f"{issuer}: {LOGIN_HINT}, or use another profile"
        )
        raise LoginRequired(msg)
    return source

"""How a command keeps a session that cannot be had again: the store is proven first, and saving is tried again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from interceptors.cli.settings import LOCK_SECONDS
from interceptors.errors import StoreError
from interceptors.session import Session
from interceptors.stores.format import UnreadableSession

if TYPE_CHECKING:
    from interceptors.oidc.client import OidcClient
    from interceptors.stores.base import SessionStore

_PAUSES: Final = (0.2, 0.5, 1.0, 2.0)


def prove_writable(store: SessionStore) -> None:
    """Sees that a session could be kept in `store`, and leaves it as it is.

    Raises:
        StoreError: It cannot be locked, read or written.
    """
    with store.lock(LOCK_SECONDS):
        try:
            session = store.load()
        except UnreadableSession:
            return  # a login is the way out of it, but whoever wrote it may want it back until then
        store.save(session or Session(access_token="none", issued_at=0.0, expires_at=0.0))  # noqa: S106 - it is none
        if session is None:
            store.clear()


def refreshed(client: OidcClient, store: SessionStore, session: Session) -> Session:
    """A new session for `session`, which `store` holds and whose lock the caller has.

    Raises:
        StoreError: `store` cannot be written; the refresh token is not spent.
        AuthError: As `OidcClient.refresh`.
    """
    store.save(session)
    return client.refresh(session)


def keep(store: SessionStore, session: Session) -> None:
    """Saves `session`; what ails a store may pass.

    Raises:
        StoreError: It has not passed for some seconds.
    """
    for pause in _PAUSES:
        try:
            store.save(session)
        except StoreError:
            time.sleep(pause)
        else:
            return
    store.save(session)

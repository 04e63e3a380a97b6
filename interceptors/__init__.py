"""Bearer tokens that outlive the session: every gRPC and Connect call carries a valid OIDC access token."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from interceptors.announcing import announce_refresh
    from interceptors.channels import authenticated_channel, intercept_channel, intercept_stub
    from interceptors.connect.interceptor import ConnectBearerInterceptor
    from interceptors.errors import AuthError, LoginRequired, RefreshError, StoreError
    from interceptors.grpc_aio.native import aio_bearer_interceptors
    from interceptors.grpc_sync.native import BearerInterceptor
    from interceptors.oidc.client import OidcClient
    from interceptors.opening import open_session
    from interceptors.refreshing import RefreshingTokenSource
    from interceptors.session import Session
    from interceptors.source import CallableTokenSource, StaticTokenSource, TokenSource
    from interceptors.stats import SourceStats
    from interceptors.stores.base import SessionStore
    from interceptors.stores.file import FileStore
    from interceptors.stores.keyring import KeyringStore
    from interceptors.stores.memory import MemoryStore
    from interceptors.stores.redis import RedisStore
    from interceptors.tokens import Token

__all__ = [
    "AuthError",
    "BearerInterceptor",
    "CallableTokenSource",
    "ConnectBearerInterceptor",
    "FileStore",
    "KeyringStore",
    "LoginRequired",
    "MemoryStore",
    "OidcClient",
    "RedisStore",
    "RefreshError",
    "RefreshingTokenSource",
    "Session",
    "SessionStore",
    "SourceStats",
    "StaticTokenSource",
    "StoreError",
    "Token",
    "TokenSource",
    "aio_bearer_interceptors",
    "announce_refresh",
    "authenticated_channel",
    "intercept_channel",
    "intercept_stub",
    "open_session",
]

# Each name is imported when it is first used, so that a program pays for the flavour and the store it uses only.
_MODULES: Final = {
    "AuthError": "errors",
    "BearerInterceptor": "grpc_sync.native",
    "CallableTokenSource": "source",
    "ConnectBearerInterceptor": "connect.interceptor",
    "FileStore": "stores.file",
    "KeyringStore": "stores.keyring",
    "LoginRequired": "errors",
    "MemoryStore": "stores.memory",
    "OidcClient": "oidc.client",
    "RedisStore": "stores.redis",
    "RefreshError": "errors",
    "RefreshingTokenSource": "refreshing",
    "Session": "session",
    "SessionStore": "stores.base",
    "SourceStats": "stats",
    "StaticTokenSource": "source",
    "StoreError": "errors",
    "Token": "tokens",
    "TokenSource": "source",
    "aio_bearer_interceptors": "grpc_aio.native",
    "announce_refresh": "announcing",
    "authenticated_channel": "channels",
    "intercept_channel": "channels",
    "intercept_stub": "channels",
    "open_session": "opening",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Fakes for the tests of programs that use this package: a real issuer and a real server, on loopback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interceptors.testing.issuer import FakeIssuer
    from interceptors.testing.server import FakeServer

__all__ = ["FakeIssuer", "FakeServer"]


def __getattr__(name: str) -> Any:
    if name == "FakeIssuer":
        from interceptors.testing.issuer import FakeIssuer

        return FakeIssuer
    if name == "FakeServer":
        from interceptors.testing.server import FakeServer

        return FakeServer
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)

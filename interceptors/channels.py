"""The ways in: choose the flavour by what is given."""

from __future__ import annotations

import copy
import ipaddress
import re
import urllib.parse
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, overload

import grpc
import grpc.aio

from interceptors.call import REPLAY_LIMIT
from interceptors.source import TokenSource

if TYPE_CHECKING:
    from collections.abc import Sequence

S = TypeVar("S")

_KINDS: Final = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")
_MULTICALLABLES: Final = tuple(getattr(grpc, f"{kind}MultiCallable") for kind in _KINDS)
_AIO_MULTICALLABLES: Final = tuple(getattr(grpc.aio, f"{kind}MultiCallable") for kind in _KINDS)


@overload
def intercept_channel(channel: grpc.Channel, source: TokenSource, *, replay_limit: int = ...) -> grpc.Channel: ...


@overload
def intercept_channel(
    channel: grpc.aio.Channel, source: TokenSource, *, replay_limit: int = ...
) -> grpc.aio.Channel: ...


def intercept_channel(channel: Any, source: TokenSource, *, replay_limit: int = REPLAY_LIMIT) -> Any:
    """A channel of the same kind whose every call carries a valid token.

    It cannot see whether the transport is encrypted; `authenticated_channel` opens a channel that is.

    Args:
        channel: A `grpc.Channel` or `grpc.aio.Channel`. It is used, not copied: closing the new one closes it.
        source: Where tokens come from. It is left open when the channel is closed.
        replay_limit: Bytes of a request stream that are kept so that it can be sent again after a refusal.

    Raises:
        TypeError: `channel` is no channel, or `source` no source.
        ValueError: `replay_limit` is negative.
    """
    check_source(source)
    check_replay_limit(replay_limit)
    if isinstance(channel, grpc.Channel):
        from interceptors.grpc_sync.channel import AuthenticatedChannel

        return AuthenticatedChannel(channel, source, replay_limit)
    if isinstance(channel, grpc.aio.Channel):
        from interceptors.grpc_aio.channel import AuthenticatedAioChannel

        return AuthenticatedAioChannel(channel, source, replay_limit)
    msg = f"channel must be a grpc.Channel or a grpc.aio.Channel, not {_name(channel)}"
    raise TypeError(msg)


def intercept_stub(stub: S, source: TokenSource, *, replay_limit: int = REPLAY_LIMIT) -> S:
    """A stub of the same type whose calls carry valid tokens; for those who are handed a stub and no channel.

    Prefer `intercept_channel`, which replays exactly what was sent.

    Args:
        stub: A generated gRPC stub, over a sync or an asyncio channel. It is not changed.
        source: Where tokens come from.
        replay_limit: See `intercept_channel`.

    Raises:
        TypeError: `stub` is no generated stub, or `source` no source.
        ValueError: `replay_limit` is negative.
    """
    check_source(source)
    check_replay_limit(replay_limit)
    methods = {
        name: _authenticated(value, source, replay_limit) for name, value in getattr(stub, "__dict__", {}).items()
    }
    if all(method is None for method in methods.values()):
        msg = f"stub must be a generated gRPC stub, such as FooServiceStub(channel), not {_name(stub)}"
        raise TypeError(msg)
    authenticated = copy.copy(stub)
    for name, method in methods.items():
        if method is not None:
            setattr(authenticated, name, method)
    return authenticated


def _authenticated(inner: object, source: TokenSource, replay_limit: int) -> Any:
    if isinstance(inner, _AIO_MULTICALLABLES):
        from interceptors.grpc_aio.channel import authenticated_multicallable as authenticated_aio

        return authenticated_aio(inner, source, replay_limit)
    if isinstance(inner, _MULTICALLABLES):
        from interceptors.grpc_sync.channel import authenticated_multicallable

        return authenticated_multicallable(inner, source, replay_limit)
    return None


@overload
def authenticated_channel(
    target: str,
    source: TokenSource,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    aio: Literal[False] = False,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    replay_limit: int = ...,
) -> grpc.Channel: ...


@overload
def authenticated_channel(
    target: str,
    source: TokenSource,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    aio: Literal[True],
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    replay_limit: int = ...,
) -> grpc.aio.Channel: ...


@overload
def authenticated_channel(
    target: str,
    source: TokenSource,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    aio: bool,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    replay_limit: int = ...,
) -> grpc.Channel | grpc.aio.Channel: ...


def authenticated_channel(
    target: str,
    source: TokenSource,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    aio: bool = False,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    replay_limit: int = REPLAY_LIMIT,
) -> Any:
    """A new channel whose every call carries a valid token, and whose transport does not give it away.

    Args:
        target: What to connect to, in gRPC's syntax: `api.example.com:443`, `dns:///...`, `unix:/run/api.sock`.
        source: Where tokens come from.
        credentials: The channel's; by default TLS with the system's roots, and plain text to loopback addresses and
            unix sockets.
        aio: Whether to open a `grpc.aio` channel.
        options: gRPC's channel options.
        compression: gRPC's.
        replay_limit: See `intercept_channel`.

    Raises:
        ValueError: `credentials` would send tokens in plain text over a network, or `target` is no gRPC target.
        TypeError: An argument is of another type.
    """
    check_source(source)
    check_replay_limit(replay_limit)
    if not isinstance(target, str):
        msg = f"target must be a str such as 'api.example.com:443', not {_name(target)}"
        raise TypeError(msg)
    if not target or re.match(r"(?i)(https?|grpcs?)://", target):
        msg = f"target must be a gRPC target such as 'api.example.com:443', without https://; it is {target!r}"
        raise ValueError(msg)
    if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
        msg = (
            f"credentials must be grpc.ChannelCredentials, such as ssl_channel_credentials(), not {_name(credentials)}"
        )
        raise TypeError(msg)
    local = is_local(target)
    if credentials is not None and not local and _is_plain_text(credentials):
        msg = (
            f"these credentials would send access tokens to {target} in plain text: leave them out (TLS is default) "
            "or pass grpc.ssl_channel_credentials(...); plain text is for loopback and unix sockets only"
        )
        raise ValueError(msg)
    library: Any = grpc.aio if aio else grpc
    if credentials is None and local:
        # A proxy between us and loopback would see the token.
        options = (*(options or ()), ("grpc.enable_http_proxy", 0))
        channel = library.insecure_channel(target, options=options, compression=compression)
    else:
        credentials = credentials or grpc.ssl_channel_credentials()
        channel = library.secure_channel(target, credentials, options=options, compression=compression)
    return intercept_channel(channel, source, replay_limit=replay_limit)


def is_local(target: str) -> bool:
    """Whether everything that `target`, a gRPC name, can lead to is on this machine."""
    scheme, colon, rest = target.partition(":")
    scheme = scheme.lower()
    if colon and scheme in {"unix", "unix-abstract"}:
        return True
    if colon and scheme in {"ipv4", "ipv6"}:
        return all(_is_loopback(address) for address in rest.lstrip("/").split(","))
    if colon and scheme == "dns":
        authority, _, host = rest[2:].partition("/") if rest.startswith("//") else ("", "", rest)
        # A name server that somebody chose may say of any name, localhost too, what it likes.
        return not authority and _is_loopback(host)
    return _is_loopback(target)


def _is_loopback(address: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(f"//{urllib.parse.unquote(address)}")
        host = parts.hostname or ""
    except ValueError:
        return False
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # An IPv6 address may stand without brackets and port.
        try:
            return ipaddress.ip_address(address).is_loopback
        except ValueError:
            return False


def _is_plain_text(credentials: grpc.ChannelCredentials) -> bool:
    inner = type(getattr(credentials, "_credentials", None)).__name__
    return inner in {"InsecureChannelCredentials", "LocalChannelCredentials", "ChannelLocalCredentials"}


def check_source(source: object) -> None:
    """Raises TypeError unless `source` is a token source."""
    if not isinstance(source, TokenSource):
        msg = (
            f"source must be a TokenSource, not {_name(source)}: open_session(...) for a stored login, "
            "StaticTokenSource(token) for a fixed token, CallableTokenSource(fn) for a function that returns one"
        )
        raise TypeError(msg)


def check_replay_limit(replay_limit: object) -> None:
    """Raises unless `replay_limit` is a number of bytes."""
    if isinstance(replay_limit, bool) or not isinstance(replay_limit, int):
        msg = f"replay_limit must be an int, a number of bytes, not {_name(replay_limit)}"
        raise TypeError(msg)
    if replay_limit < 0:
        msg = f"replay_limit must be 0 bytes or more, not {replay_limit}"
        raise ValueError(msg)


def _name(thing: object) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__

"""What the response said that became a ConnectError: whether it refused the token, and whether another may help."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from connectrpc.code import Code
from connectrpc.errors import ConnectError

if TYPE_CHECKING:
    from collections.abc import Iterator

# RFC 9110 section 11.2. A quoted value is taken whole, whatever it quotes.
_AUTH_PARAM: Final = re.compile(r'([\w!#$%&\'*+.^`|~-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s",]+)')
_WWW_AUTHENTICATE: Final = "www-authenticate"
# The names that connectrpc gives in its own frames to a response, and to the trailers of one.
_RESPONSES: Final = ("resp", "response")
_TRAILERS: Final = ("trailers", "metadata")


def refusal_of(error: ConnectError) -> ConnectError | None:
    """`error` if it says UNAUTHENTICATED, or what says so in its place if it is made of an HTTP 401; else None.

    A 401 whose body is JSON, but no Connect error, as some gateways send it, is UNAVAILABLE to connectrpc.
    """
    if error.code is Code.UNAUTHENTICATED:
        return error
    if error.code is not Code.UNAVAILABLE or HTTPStatus.UNAUTHORIZED not in _statuses(error):
        return None
    # What a library said while it tripped over the body is of no use to anybody.
    said = error.message if error.__cause__ is None and error.message else HTTPStatus.UNAUTHORIZED.phrase
    refusal = ConnectError(Code.UNAUTHENTICATED, said)
    refusal.__cause__ = error
    return refusal


def asks_for_more_scope(error: ConnectError) -> bool:
    """Whether a challenge that came with `error` says that the token lacks a scope (RFC 6750 section 3.1).

    Another token would have the same one.
    """
    return any(
        name.lower() == "error" and value.strip('"').lower() == "insufficient_scope"
        for challenge in _challenges(error)
        for name, value in _AUTH_PARAM.findall(challenge)
    )


# A ConnectError carries no headers. connectrpc hands them to a ResponseMetadata only, which would have to be there for
# each call, most of which succeed, and copies all headers. So they are looked for where the error was raised: what
# cannot be found there costs one refresh in vain.


def _seen_by_connectrpc(error: ConnectError, names: tuple[str, ...]) -> Iterator[Any]:
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if str(frame.f_globals.get("__name__")).startswith("connectrpc."):
            yield from filter(None, map(frame.f_locals.get, names))
        traceback = traceback.tb_next


def _statuses(error: ConnectError) -> Iterator[Any]:
    return (getattr(response, "status", None) for response in _seen_by_connectrpc(error, _RESPONSES))


def _challenges(error: ConnectError) -> Iterator[str]:
    for response in _seen_by_connectrpc(error, _RESPONSES):
        yield from _challenges_in(getattr(response, "headers", None))
        yield from _challenges_in(getattr(response, "trailers", None))
    for trailers in _seen_by_connectrpc(error, _TRAILERS):
        yield from _challenges_in(trailers)


def _challenges_in(headers: Any) -> Iterator[str]:
    for key, value in headers.items() if hasattr(headers, "items") else ():
        if isinstance(key, str) and key.lower().removeprefix("trailer-") == _WWW_AUTHENTICATE:
            yield from (str(each) for each in (value if isinstance(value, (list, tuple)) else [value]))

"""The `www-authenticate` challenges that came with a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from connectrpc.errors import ConnectError

_WWW_AUTHENTICATE: Final = "www-authenticate"


def challenges_of(error: ConnectError) -> Iterator[str]:
    """Every challenge in the headers, trailers and end of stream of the response that became `error`.

    A ConnectError carries no headers. connectrpc hands them to a ResponseMetadata only, which would have to be there
    for each call, most of which succeed, and copies all headers. So they are looked for where the error was raised:
    what cannot be found there costs one refresh in vain.
    """
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if str(frame.f_globals.get("__name__")).startswith("connectrpc."):
            for value in frame.f_locals.values():
                yield from _challenges_in(value)
                yield from _challenges_in(getattr(value, "headers", None))
                yield from _challenges_in(getattr(value, "trailers", None))
        traceback = traceback.tb_next


def _challenges_in(headers: Any) -> Iterator[str]:
    items = getattr(headers, "items", None)
    if not callable(items) or isinstance(headers, type):
        return
    for key, value in items():
        if isinstance(key, str) and key.lower().removeprefix("trailer-") == _WWW_AUTHENTICATE:
            yield from (str(each) for each in (value if isinstance(value, (list, tuple)) else [value]))

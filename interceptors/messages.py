"""What is kept and sent of a request message: its serialised form where that is ours to make, else a copy."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("interceptors")


def prepared(prepare: Callable[[Any], Any], request: Any) -> Any:
    """What `prepare` makes of `request`; None, with which gRPC ends the call itself, if it fails."""
    try:
        return prepare(request)
    except Exception:  # noqa: BLE001 - it ends the call
        log_unserialisable()
        return None


def log_unserialisable() -> None:
    """Says what gRPC says; for a request of None it then ends the call with INTERNAL, as if it had failed itself."""
    _log.exception("Exception serializing message!")


def as_it_is(request: Any) -> Any:
    """`request` itself: for messages that are bytes already, or whose sender must not change them."""
    return request


def snapshot(request: Any) -> Any:
    """A copy, so that a caller who changes the message later does not change what is sent again."""
    try:
        return copy.deepcopy(request)
    except Exception:  # noqa: BLE001 - what cannot be copied is sent as it is
        return request


def size_of(message: Any) -> int:
    """How much of a replay limit a message takes: its serialised size in bytes, whichever protobuf library it is of."""
    if isinstance(message, (bytes, bytearray, memoryview)):
        return len(message)
    byte_size = getattr(message, "ByteSize", None)
    if callable(byte_size):
        return int(byte_size())
    to_binary = getattr(message, "to_binary", None)
    return len(to_binary()) if callable(to_binary) else 0

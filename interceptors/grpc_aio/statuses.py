"""What an attempt that is over says of its end: knowledge of grpc.aio's insides, all in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc.aio import AioRpcError

if TYPE_CHECKING:
    from collections.abc import Coroutine

_PROVISIONAL_DETAILS: Final = "Internal error from Core"


def is_ok(attempt: Any) -> bool:
    """Whether `attempt`, which is over, has ended well; False if that takes a closer look."""
    native = getattr(attempt, "_cython_call", None)
    return native is not None and native.is_ok()


def is_provisional(attempt: Any, code: grpc.StatusCode) -> bool:
    """Whether `code` is not the server's.

    When a write fails because the server has ended the call, grpc.aio says INTERNAL: before it has read the server's
    status, which then replaces it, or afterwards.
    """
    return code is grpc.StatusCode.INTERNAL and now(attempt.details()) == _PROVISIONAL_DETAILS


def status_now(attempt: Any) -> AioRpcError | None:
    """How `attempt`, which is over, has failed; kept because grpc.aio may put something else in its place."""
    code = now(attempt.code())
    if code is None:
        return None
    return AioRpcError(
        code,
        now(attempt.initial_metadata()),
        now(attempt.trailing_metadata()),
        now(attempt.details()),
        now(attempt.debug_error_string()),
    )


async def said_by(teller: Any, what: str) -> Any:
    """What an error, or an attempt that is over, says of itself."""
    said = getattr(teller, what)()
    return said if isinstance(teller, AioRpcError) else await said


def now(answer: Coroutine[Any, Any, Any]) -> Any:
    """What `answer` returns if it need not wait; else None."""
    try:
        answer.send(None)
    except StopIteration as returned:
        return returned.value
    answer.close()
    return None

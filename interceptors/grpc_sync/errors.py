"""How a call ends that no server has decided: with an error that has all that gRPC's own have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from interceptors.call import Failure


class LocalError(grpc.RpcError, grpc.Call, grpc.Future):
    """The end of a call that no server has decided: no token, no time left, or cancelled between two attempts."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"<status={code.name}, details={details!r}>")
        self._code = code
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def debug_error_string(self) -> str:
        return self._details

    def initial_metadata(self) -> tuple[()]:
        return ()

    def trailing_metadata(self) -> tuple[()]:
        return ()

    def is_active(self) -> bool:
        return False

    def __next__(self) -> NoReturn:
        raise self

    def time_remaining(self) -> float:
        return 0.0

    def cancel(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return self._code is grpc.StatusCode.CANCELLED

    def running(self) -> bool:
        return False

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> NoReturn:  # noqa: ARG002 - it is over, here and below
        raise self

    def exception(self, timeout: float | None = None) -> LocalError:  # noqa: ARG002
        return self

    def traceback(self, timeout: float | None = None) -> TracebackType | None:  # noqa: ARG002
        return traceback_of(self)

    def add_callback(self, callback: Callable[[], None]) -> bool:  # noqa: ARG002
        return False

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        fn(self)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} of RPC that terminated with:\n"
            f'\tstatus = {self._code}\n\tdetails = "{self._details}"\n>'
        )

    __str__ = __repr__


def local_error(failure: Failure) -> LocalError:
    """The error that a caller gets for `failure`."""
    error = LocalError(grpc.StatusCode[failure.code], failure.details)
    error.__cause__ = failure.cause
    return error


def traceback_of(outcome: Exception) -> TracebackType | None:
    """The traceback of raising `outcome` here, as gRPC has it."""
    try:
        raise outcome from outcome.__cause__
    except Exception as error:  # noqa: BLE001 - it is `outcome`
        return error.__traceback__

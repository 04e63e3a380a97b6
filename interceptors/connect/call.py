"""What the sync and the async flavour have in common, without I/O: a call's dealings with its context and source."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, Protocol

from connectrpc.client import ResponseMetadata
from connectrpc.code import Code
from connectrpc.errors import ConnectError

from interceptors.call import Call, Failure, Send, deadline_of
from interceptors.connect.refusals import asks_for_more_scope, refusal_of

if TYPE_CHECKING:
    from connectrpc.request import RequestContext

    from interceptors.source import TokenSource
    from interceptors.tokens import Token

_CONNECT_TIMEOUT: Final = "connect-timeout-ms"
_GRPC_TIMEOUT: Final = "grpc-timeout"
_GRPC_TIMEOUT_UNITS: Final = (("m", 1), ("S", 1000), ("M", 60 * 1000), ("H", 60 * 60 * 1000))
_GRPC_TIMEOUT_DIGITS: Final = 8

_CURRENT_RESPONSE: Final = "connectrpc_current_response"


class Requests(Protocol):
    """A request stream that can be sent again, sync or async."""

    def rewind(self) -> bool:
        """Makes ready for another attempt, if that is possible."""


class ConnectCall:
    """One call of a Connect client; made when more has to be done than to send a fresh token.

    Args:
        source: Where tokens come from.
        ctx: The call's, which its attempts share.
    """

    __slots__ = ("_ctx", "_refusal", "core")

    def __init__(self, source: TokenSource, ctx: RequestContext[Any, Any]) -> None:
        self._ctx = ctx
        self._refusal: ConnectError | None = None
        # The context counts down by itself, so this is right however late it comes.
        timeout_ms = ctx.timeout_ms
        self.core = Call(source, deadline_of(None if timeout_ms is None else timeout_ms / 1000))

    def first(self, answer: Token | BaseException) -> Token:
        """The token for the first attempt, after waiting for the source; raises the error that the caller gets."""
        return self._to_send(self.core.begin(answer))

    def refused(self, token: Token, error: ConnectError, requests: Requests | None) -> bool:
        """Whether an attempt that ended with `error`, before any response, is followed by another one.

        Raises:
            ConnectError: It is not, and this is what the caller gets instead of `error`.
        """
        refusal = refusal_of(error)
        if refusal is None:
            self.core.ended(error.code.name)
        elif not asks_for_more_scope(error) and self.core.refused(
            token, replayable=requests is None or requests.rewind()
        ):
            self._refusal = refusal
            return True
        elif refusal is not error:
            raise refusal
        return False

    def again(self, answer: Token | BaseException) -> Token:
        """The token for the second attempt; raises the error that the caller gets, the refusal maybe."""
        refusal, self._refusal = self._refusal, None
        assert refusal is not None
        decision = self.core.again(answer)
        if not isinstance(decision, (Send, Failure)):
            if decision.cause is not None:
                refusal.__cause__ = decision.cause
            try:
                raise refusal
            finally:
                del refusal  # or it and this frame would keep each other alive
        token = self._to_send(decision)
        self._forget_response()
        return token

    def passed(self) -> None:
        """The attempt got past authentication."""
        self.core.passed()

    def ended(self, token: Token, error: ConnectError) -> None:
        """The call ended with `error` after its first response."""
        if error.code is Code.UNAUTHENTICATED and not asks_for_more_scope(error):
            self.core.refused(token, replayable=False)

    def _to_send(self, decision: Send | Failure) -> Token:
        if isinstance(decision, Failure):
            raise _error(decision) from decision.cause
        self._say_what_is_left()
        return decision.token

    def _say_what_is_left(self) -> None:
        """Corrects the timeout header, which was written when the call began."""
        headers, timeout_ms = self._ctx.request_headers, self._ctx.timeout_ms
        if timeout_ms is None:
            return
        if _CONNECT_TIMEOUT in headers:
            headers[_CONNECT_TIMEOUT] = str(max(int(timeout_ms), 1))
        if _GRPC_TIMEOUT in headers:
            headers[_GRPC_TIMEOUT] = _grpc_timeout(max(int(timeout_ms), 1))

    def _forget_response(self) -> None:
        """Takes the refusal's headers and trailers out of everything that the caller can see."""
        response = _callers_response()
        if response is not None:
            response.headers.clear()
            response.trailers.clear()
            response._http_status = None  # noqa: SLF001 - there is no other way; it matters if no second response comes
        self._ctx.response_headers.clear()
        self._ctx.response_trailers.clear()


def _grpc_timeout(timeout_ms: int) -> str:
    for unit, size in _GRPC_TIMEOUT_UNITS:
        value = str(timeout_ms // size)
        if len(value) <= _GRPC_TIMEOUT_DIGITS:
            return f"{value}{unit}"
    return "9" * _GRPC_TIMEOUT_DIGITS + "H"


def _error(failure: Failure) -> ConnectError:
    # What connectrpc says itself when the time is up.
    said = "Request timed out" if failure.code == "DEADLINE_EXCEEDED" else failure.details
    return ConnectError(Code[failure.code], said)


def _callers_response() -> ResponseMetadata | None:
    """The innermost ResponseMetadata that the call is made in."""
    # The program may keep others in variables of its own.
    present = copy_context().items()
    responses = (value for variable, value in present if variable.name == _CURRENT_RESPONSE)
    return next((value for value in responses if isinstance(value, ResponseMetadata)), None)

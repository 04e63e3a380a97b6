"""What the sync and the async flavour have in common, without I/O: a call's dealings with its context and its source."""

from __future__ import annotations

import re
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, Protocol

from connectrpc.client import ResponseMetadata
from connectrpc.code import Code
from connectrpc.errors import ConnectError

from interceptors import replay
from interceptors.call import Call, Failure, Send, deadline_of
from interceptors.tokens import AUTHORIZATION

if TYPE_CHECKING:
    from contextvars import ContextVar

    from connectrpc.request import RequestContext

    from interceptors.source import TokenSource
    from interceptors.tokens import Token

_CONNECT_TIMEOUT: Final = "connect-timeout-ms"
_GRPC_TIMEOUT: Final = "grpc-timeout"
_GRPC_TIMEOUT_UNITS: Final = (("m", 1), ("S", 1000), ("M", 60 * 1000), ("H", 60 * 60 * 1000))
_GRPC_TIMEOUT_DIGITS: Final = 8

_WWW_AUTHENTICATE: Final = "www-authenticate"
_INSUFFICIENT_SCOPE: Final = re.compile(r'(?:^|[\s,])error\s*=\s*"?insufficient_scope(?:$|["\s,])', re.IGNORECASE)


class Requests(Protocol):
    """A request stream that can be sent again, sync or async."""

    def rewind(self) -> bool:
        """Makes ready for another attempt, if that is possible."""


class ConnectCall:
    """One call of a Connect client. `with call.carrying(token):` is around the sending of an attempt.

    Args:
        source: Where tokens come from.
        ctx: The call's, which its attempts share.
    """

    __slots__ = ("_core", "_ctx", "_earlier", "_own", "_refusal", "_response", "_source", "_token")

    def __init__(self, source: TokenSource, ctx: RequestContext[Any, Any]) -> None:
        self._source = source
        self._ctx = ctx
        self._core: Call | None = None

    @property
    def core(self) -> Call:
        """The call's dealings with its source; a call with a fresh token that is not refused has none."""
        if self._core is None:
            timeout_ms = self._ctx.timeout_ms
            self._core = Call(self._source, deadline_of(None if timeout_ms is None else timeout_ms / 1000))
        return self._core

    # An attempt

    def carrying(self, token: Token) -> ConnectCall:
        """The context in which an attempt is sent with `token`, up to its end or its first response."""
        self._token = token
        return self

    def __enter__(self) -> None:
        # Set, not added: an attempt carries exactly one.
        self._ctx.request_headers[AUTHORIZATION] = self._token.header
        # A ConnectError carries no headers, so the refusal's are heard on the caller's ResponseMetadata or one of ours.
        response = _present_response.get(None)
        if response is None:
            self._own: ResponseMetadata | None = ResponseMetadata()
            self._response = self._own.__enter__()
            self._earlier = 0
        else:
            self._own = None
            self._response = response
            # Trailers of several calls pile up in it.
            self._earlier = len(response.trailers.getall(_WWW_AUTHENTICATE))

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own.__exit__(None, None, None)
        # Left there, the token would show in others' logs, and pass for the caller's own if they make the call again.
        self._ctx.request_headers.pop(AUTHORIZATION, None)

    # What comes of it

    def first(self, answer: Token | BaseException) -> Token:
        """The token for the first attempt, after waiting for the source; raises the error that the caller gets."""
        return self._to_send(self.core.begin(answer))

    def refused(self, error: ConnectError, requests: Requests | None) -> bool:
        """Whether an attempt that ended with `error`, before any response, is followed by another one."""
        if not self._is_refusal(error):
            self.passed()
            return False
        if self.core.refused(self._token, replayable=requests is None or requests.rewind()):
            self._refusal: ConnectError | None = error
            return True
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
        if self._core is not None:
            self._core.passed()

    def ended(self, error: ConnectError) -> None:
        """The call ended with `error` after its first response."""
        if self._is_refusal(error):
            self.core.refused(self._token, replayable=False)

    def _to_send(self, decision: Send | Failure) -> Token:
        if isinstance(decision, Failure):
            raise _error(decision) from decision.cause
        self._say_what_is_left()
        return decision.token

    def _is_refusal(self, error: ConnectError) -> bool:
        if error.code is not Code.UNAUTHENTICATED:
            return False
        # Another token would have the same scope (RFC 6750 section 3.1).
        response = self._response
        challenges = response.headers.getall(_WWW_AUTHENTICATE)
        challenges = [*challenges, *response.trailers.getall(_WWW_AUTHENTICATE)[self._earlier :]]
        return not any(_INSUFFICIENT_SCOPE.search(challenge) for challenge in challenges)

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
        response = self._response
        response.headers.clear()
        response.trailers.clear()
        response._http_status = None  # noqa: SLF001 - there is no other way; it matters if no second response comes
        self._ctx.response_headers.clear()
        self._ctx.response_trailers.clear()


def size_of(message: Any) -> int:
    """How much of a replay limit a message takes, whichever protobuf library it is of: its serialised size in bytes."""
    if hasattr(message, "ByteSize"):
        return replay.size_of(message)
    to_binary = getattr(message, "to_binary", None)
    return len(to_binary()) if to_binary is not None else replay.size_of(message)


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


def _variable_of_present_response() -> ContextVar[ResponseMetadata]:
    with ResponseMetadata() as probe:
        return next(variable for variable, value in copy_context().items() if value is probe)


_present_response: Final = _variable_of_present_response()

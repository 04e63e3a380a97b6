"""The adapter for people who compose with `grpc.intercept_channel`: the same core, at gRPC's own price."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from interceptors.call import REPLAY_LIMIT, Call, deadline_of
from interceptors.channels import check_replay_limit, check_source
from interceptors.grpc_sync.call import AuthenticatedCall, is_done
from interceptors.grpc_sync.calling import UNAUTHENTICATED, attached, is_untouched, redacted
from interceptors.messages import as_it_is, size_of
from interceptors.replay import ReplayableRequests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from interceptors.source import TokenSource
    from interceptors.tokens import Token


class BearerInterceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Attaches tokens to the calls of a `grpc.intercept_channel(channel, BearerInterceptor(source), ...)`.

    Put it last, nearest to the wire, so that the others see one call where it makes two attempts. Prefer
    `interceptors.intercept_channel` where nothing else is composed: it costs less, and as it serialises the messages
    itself, a caller that changes a message after handing it over does not change what is replayed.

    Args:
        source: Where tokens come from.
        replay_limit: Bytes of a request stream that are kept so that it can be sent again after a refusal.

    Raises:
        TypeError: `source` is no source.
        ValueError: `replay_limit` is negative.
    """

    def __init__(self, source: TokenSource, *, replay_limit: int = REPLAY_LIMIT) -> None:
        check_source(source)
        check_replay_limit(replay_limit)
        self._source = source
        self._replay_limit = replay_limit

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """See `grpc.UnaryUnaryClientInterceptor`."""
        return self._intercept(continuation, client_call_details, request)

    def intercept_unary_stream(
        self, continuation: Callable[[Any, Any], Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """See `grpc.UnaryStreamClientInterceptor`."""
        return self._intercept(continuation, client_call_details, request)

    def intercept_stream_unary(
        self,
        continuation: Callable[[Any, Any], Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[Any],
    ) -> Any:
        """See `grpc.StreamUnaryClientInterceptor`."""
        return self._intercept_stream(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(
        self,
        continuation: Callable[[Any, Any], Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[Any],
    ) -> Any:
        """See `grpc.StreamStreamClientInterceptor`."""
        return self._intercept_stream(continuation, client_call_details, request_iterator)

    def _intercept_stream(self, continuation: Callable[[Any, Any], Any], details: Any, requests: Iterator[Any]) -> Any:
        kept = ReplayableRequests(requests, as_it_is, size_of, self._replay_limit)
        return self._intercept(lambda details, _: continuation(details, kept.attempt()), details, None, kept)

    def _intercept(
        self,
        continuation: Callable[[Any, Any], Any],
        details: Any,
        request: Any,
        requests: ReplayableRequests[Any, Any] | None = None,
    ) -> Any:
        metadata = None if details.metadata is None else tuple(details.metadata)
        if is_untouched(metadata, details.credentials):
            if requests is not None:
                requests.free()
            return continuation(_Details.of(details, metadata, details.timeout), request)

        def start(token: Token, timeout: float | None) -> Any:
            try:
                return continuation(_Details.of(details, attached(token, metadata), timeout), request)
            except ValueError as error:
                raise redacted(error, token) from None

        call = Call(self._source, deadline_of(details.timeout))
        token = self._source.peek()
        # A continuation of `__call__` blocks until its attempt is over, so further ones have threads of their own.
        handle = AuthenticatedCall(self._source, start, call, requests, blocking_start=True)
        if token is None:
            handle.begin(None, details.timeout)
            return handle
        outcome = start(token, details.timeout)
        if is_done(outcome) and outcome.code() is not UNAUTHENTICATED:
            if requests is not None:
                requests.stop()
            return outcome
        handle.adopt(token, outcome)
        return handle


class _Fields(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Details(_Fields, grpc.ClientCallDetails):
    @classmethod
    def of(cls, details: Any, metadata: Any, timeout: float | None) -> _Details:
        return cls(
            details.method,
            timeout,
            metadata,
            details.credentials,
            getattr(details, "wait_for_ready", None),
            getattr(details, "compression", None),
        )

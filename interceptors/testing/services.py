"""What the fake services do, written once: who is let in, what is recorded, what is answered."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import grpc

from interceptors.gen.kontext.agent.v1 import event_pb2, heartbeat_pb2
from interceptors.testing.attempts import Plan, Refused, ServedCall
from interceptors.testing.issuer import TokenRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interceptors.tokens import Token


class Services:
    """The state of both fake services.

    Args:
        verify: Raises `TokenRefused` unless an access token is good.
    """

    def __init__(self, verify: Callable[[str], object]) -> None:
        self._verify = verify
        self._changed = threading.Condition()
        self._plans: list[Plan] = []
        self._refuse_all = False
        self._refused_tokens: set[str] = set()
        self._held = False
        self._closed = False
        self.heartbeats: Counter[str] = Counter()
        self.attempts = 0
        """Transmissions that have arrived, refused ones too."""
        self.refusals = 0
        self.calls: list[ServedCall] = []
        """Every call that was executed, oldest first."""

    # What a test can make the server do

    def refuse_next(
        self,
        count: int = 1,
        *,
        after_messages: int = 0,
        method: str | None = None,
        code: str = "UNAUTHENTICATED",
        details: str = "the fake server was told to refuse this call",
    ) -> None:
        """Refuses the next calls that come with a good token.

        Args:
            count: How many.
            after_messages: Only after so many messages have been received (or sent, if only the answers stream).
            method: Only calls of this method, such as "Heartbeat".
            code: The status, a name of gRPC's.
            details: The status' message.

        Raises:
            ValueError: There is no such status, or it is no refusal.
        """
        if code not in grpc.StatusCode.__members__ or code == "OK":
            msg = f"code must be the name of one of gRPC's statuses but OK, such as UNAVAILABLE, not {code!r}"
            raise ValueError(msg)
        with self._changed:
            self._plans += [Plan(after_messages, code, details, method) for _ in range(count)]

    def refuse_all(self, refuse: bool = True) -> None:  # noqa: FBT001, FBT002 - reads well at the call
        """Refuses every call, whatever its token."""
        self._refuse_all = refuse

    def refuse_token(self, token: Token) -> None:
        """Refuses every call that carries this token, although its issuer holds it for good."""
        with self._changed:
            self._refused_tokens.add(token.value)

    def hold(self) -> None:
        """Keeps calls waiting at the door, until `release`."""
        self._held = True

    def release(self) -> None:
        """Ends `hold`."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    # What a test can ask

    @property
    def event_ids(self) -> list[str]:
        """The ids of all events that were executed, in order."""
        with self._changed:
            return [event_id for call in self.calls for event_id in call.event_ids]

    def wait_for(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        """Waits until `condition()` holds; it is looked at whenever a call has arrived, ended or was refused.

        Raises:
            TimeoutError: It did not hold within `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                msg = f"what was waited for did not happen within {timeout:g} s"
                raise TimeoutError(msg)

    # For the servers

    def open_up(self) -> None:
        """Calls may come."""
        self._closed = False

    def close_down(self) -> None:
        """Has whoever waits stop: the server is being stopped."""
        with self._changed:
            self._closed = True
            self._held = False
            self._changed.notify_all()

    # For `Attempt`

    @property
    def held(self) -> bool:
        """Whether calls wait at the door."""
        return self._held

    def arrived(self) -> None:
        """A call has come."""
        with self._changed:
            self.attempts += 1
            self._changed.notify_all()

    def wait_at_the_door(self, gone: threading.Event) -> None:
        """Waits until calls are let in, or the client is `gone`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or gone.is_set())

    def admit(self, method: str, metadata: Sequence[tuple[str, str]]) -> tuple[str, Plan | None]:
        """The token of a call that is let in, and what is planned for it; raises `Refused`."""
        try:
            token = self._good_token(metadata)
        except Refused:
            self.refused()
            raise
        with self._changed:
            for plan in self._plans:
                if plan.method in {None, method}:
                    self._plans.remove(plan)
                    return token, plan
        return token, None

    def _good_token(self, metadata: Sequence[tuple[str, str]]) -> str:
        values = [value for key, value in metadata if key.lower() == "authorization"]
        if len(values) != 1 or not values[0].startswith("Bearer "):
            msg = f"expected one bearer token, got {len(values)} authorization entries"
            raise Refused(msg)
        token = values[0].removeprefix("Bearer ")
        if self._refuse_all:
            raise Refused("every token is refused")
        if token in self._refused_tokens:
            raise Refused("this token is refused")
        try:
            self._verify(token)
        except TokenRefused as error:
            msg = f"the token is refused: {error}"
            raise Refused(msg) from None
        return token

    def refused(self) -> None:
        """A call was refused."""
        with self._changed:
            self.refusals += 1
            self._changed.notify_all()

    def executed(self, call: ServedCall) -> None:
        """A call has come to its good end."""
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()

    def wait_for_change(self, session_id: str, sent: int, gone: threading.Event) -> bool:
        """Waits until a watcher that was `sent` so many messages is due another one; False if it is `gone`.

        The first is due at once, and one more with each heartbeat.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: gone.is_set() or self._closed or self.heartbeats[session_id] >= sent
            ) and not (gone.is_set() or self._closed)

    def hang_up(self, gone: threading.Event) -> None:
        """Has whoever waits on behalf of a client that is `gone` stop."""
        with self._changed:
            gone.set()
            self._changed.notify_all()

    # What is answered

    def heartbeat(self, request: Any) -> Any:
        """Answers Heartbeat."""
        with self._changed:
            self.heartbeats[request.session_id] += 1
            self._changed.notify_all()
        return heartbeat_pb2.HeartbeatResponse(sequence=request.sequence, state=_ACTIVE)

    def session(self, request: Any) -> Any:
        """Answers GetSession."""
        return heartbeat_pb2.GetSessionResponse(
            session_id=request.session_id, state=_ACTIVE, heartbeats=self.heartbeats[request.session_id]
        )

    def session_change(self, request: Any, sequence: int) -> Any:
        """One answer to WatchSession."""
        return heartbeat_pb2.WatchSessionResponse(session_id=request.session_id, sequence=sequence, state=_ACTIVE)

    def decision(self, request: Any) -> Any:
        """Answers ProcessHookEvent."""
        decision, reason = _decide(request.event)
        return event_pb2.ProcessHookEventResponse(decision=decision, reason=reason, event_id=request.event.event_id)

    def streamed_decision(self, request: Any) -> Any:
        """One answer to StreamHookEvents."""
        decision, reason = _decide(request.event)
        return event_pb2.StreamHookEventsResponse(decision=decision, reason=reason, event_id=request.event.event_id)

    def ingested(self, requests: Sequence[Any]) -> Any:
        """Answers IngestEvents."""
        event_ids = [request.event.event_id for request in requests]
        return event_pb2.IngestEventsResponse(accepted=len(event_ids), event_ids=event_ids)


_ACTIVE: Final = heartbeat_pb2.SESSION_STATE_ACTIVE


def _decide(event: Any) -> tuple[Any, str]:
    if event.tool_name == "Bash" and b"rm -rf" in event.tool_input:
        return event_pb2.DECISION_DENY, "that would remove too much"
    if event.permission_mode == "plan":
        return event_pb2.DECISION_ASK, "in plan mode a person decides"
    return event_pb2.DECISION_ALLOW, ""

"""What the fake services do, written once: who is let in, what is recorded, what is answered."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from interceptors.gen.kontext.agent.v1 import event_pb2, heartbeat_pb2
from interceptors.testing.issuer import TokenRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class ServedCall:
    """A call that was executed: it got past authentication and ran to its end."""

    method: str
    messages: tuple[Any, ...]
    token: str = field(repr=False)
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    time_remaining: float | None
    at: float

    @property
    def event_ids(self) -> tuple[str, ...]:
        """The ids of the events in the call's messages."""
        return tuple(message.event.event_id for message in self.messages if hasattr(message, "event"))


class Refused(Exception):  # noqa: N818 - it says what happened
    """The call is refused; the message is what the client sees."""

    def __init__(self, details: str, code: str = "UNAUTHENTICATED") -> None:
        super().__init__(details)
        self.code = code


@dataclass
class _Plan:
    """Refuse one call, once it has received (or, if it streams its answers, sent) so many messages."""

    after_messages: int
    code: str
    details: str
    method: str | None


class Attempt:
    """One transmission of a call, as the server sees it."""

    def __init__(
        self,
        services: Services,
        method: str,
        metadata: Sequence[tuple[str, str]],
        time_remaining: float | None,
    ) -> None:
        self._services = services
        self._method = method
        self._metadata = tuple((key, value) for key, value in metadata)
        self._time_remaining = time_remaining
        self._token = ""
        self._messages: list[Any] = []
        self._plan: _Plan | None = None
        self._sent = 0

    def begin(self) -> None:
        """Lets the call in, or raises `Refused`."""
        self._token, self._plan = self._services._admit(self._method, self._metadata)  # noqa: SLF001
        self._check(0)

    def took(self, message: Any) -> None:
        """The one request of a call that streams its answers has come."""
        self._messages.append(message)

    def received(self, message: Any) -> None:
        """A request has come; raises `Refused` if it is the one too many."""
        self.took(message)
        self._check(len(self._messages))

    def sent(self) -> None:
        """A response was sent; raises `Refused` if it is the one too many."""
        self._sent += 1
        self._check(self._sent)

    def executed(self) -> None:
        """The call has come to its good end."""
        self._services._record(  # noqa: SLF001
            ServedCall(
                self._method, tuple(self._messages), self._token, self._metadata, self._time_remaining, time.time()
            )
        )

    def _check(self, messages: int) -> None:
        plan = self._plan
        if plan is not None and messages >= plan.after_messages:
            self._services._count_refusal()  # noqa: SLF001
            raise Refused(plan.details, plan.code)


class Services:
    """The state of both fake services.

    Args:
        verify: Raises `TokenRefused` unless an access token is good.
    """

    def __init__(self, verify: Callable[[str], object]) -> None:
        self._verify = verify
        self._changed = threading.Condition()
        self._plans: list[_Plan] = []
        self._refuse_all = False
        self._open = threading.Event()
        self._open.set()
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
        """
        with self._changed:
            self._plans += [_Plan(after_messages, code, details, method) for _ in range(count)]

    def refuse_all(self, refuse: bool = True) -> None:  # noqa: FBT001, FBT002 - reads well at the call
        """Refuses every call, whatever its token."""
        self._refuse_all = refuse

    def hold(self) -> None:
        """Keeps calls waiting at the door, until `release`."""
        self._open.clear()

    def release(self) -> None:
        """Ends `hold`."""
        self._open.set()

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

    # For `Attempt`

    def _admit(self, method: str, metadata: Sequence[tuple[str, str]]) -> tuple[str, _Plan | None]:
        with self._changed:
            self.attempts += 1
            self._changed.notify_all()
        self._open.wait()
        try:
            values = [value for key, value in metadata if key.lower() == "authorization"]
            if len(values) != 1 or not values[0].startswith("Bearer "):
                msg = f"expected one bearer token, got {len(values)} authorization entries"
                raise Refused(msg)
            token = values[0].removeprefix("Bearer ")
            if self._refuse_all:
                raise Refused("every token is refused")
            try:
                self._verify(token)
            except TokenRefused as error:
                msg = f"the token is refused: {error}"
                raise Refused(msg) from None
        except Refused:
            self._count_refusal()
            raise
        with self._changed:
            for plan in self._plans:
                if plan.method in {None, method}:
                    self._plans.remove(plan)
                    return token, plan
        return token, None

    def _count_refusal(self) -> None:
        with self._changed:
            self.refusals += 1
            self._changed.notify_all()

    def _record(self, call: ServedCall) -> None:
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()

    # What is answered

    def heartbeat(self, request: Any) -> Any:
        """Answers Heartbeat."""
        with self._changed:
            self.heartbeats[request.session_id] += 1
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

"""How a session is written down: versioned JSON, so that an older release can refuse a newer one politely."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Final

from interceptors.errors import StoreError
from interceptors.session import Session

VERSION: Final = 1

_FIELDS: Final = {field.name for field in fields(Session)}


class UnreadableSession(StoreError):  # noqa: N818 - it says what is there
    """The place can be read, but what it holds is no session that this release knows."""


def dumps(session: Session) -> str:
    """`session` as text, in ASCII."""
    content = {name: value for name, value in asdict(session).items() if value is not None}
    return json.dumps({"version": VERSION, "session": content}, separators=(",", ":"))


def loads(text: str | bytes, place: str, remedy: str) -> Session:
    """The session that `dumps` has written.

    Args:
        text: What was read.
        place: Where, for the message of an error.
        remedy: How to get rid of it, for the message of an error.

    Raises:
        UnreadableSession: It is no session, or one that a newer release has written. The message shows no content.
    """
    problem = "it is damaged"
    try:
        document = json.loads(text)
        version = document["version"]
        if isinstance(version, int) and version > VERSION:
            msg = (
                f"the session in {place} was written by a newer release of interceptors (format {version}, this one "
                f"reads up to {VERSION}): upgrade interceptors, or {remedy}"
            )
            raise UnreadableSession(msg)
        content = document["session"]
        if version == VERSION and isinstance(content, dict):
            # A field that this release does not know was added by one that says the format is still compatible.
            known = {name: value for name, value in content.items() if name in _FIELDS}
            if all(_fits(name, value) for name, value in known.items()):
                return Session(**known)
            problem = "a field of it is of the wrong type"
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    msg = f"the session in {place} cannot be read, {problem}: {remedy}"
    raise UnreadableSession(msg)


def _fits(name: str, value: object) -> bool:
    if name in {"expires_at", "issued_at"}:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, str)

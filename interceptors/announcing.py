"""What a person at a terminal is told of a refresh."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interceptors.session import Session


def announce_refresh(session: Session) -> None:  # noqa: ARG001 - the signature of on_refresh
    """Says on stderr that the token was refreshed: `RefreshingTokenSource(..., on_refresh=announce_refresh)`."""
    stream = sys.stderr
    if stream is None:  # a program without a console
        return
    sign = "✓ "
    try:
        # Not by printing it: stderr replaces what it cannot show, by something worse.
        sign.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        sign = ""
    print(f"{sign}Token refreshed", file=stream, flush=True)

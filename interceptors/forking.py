"""What `os.fork()` leaves behind in a child: locks that nobody will release and threads that do not run."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class _Renewed(Protocol):
    def _after_fork_in_child(self) -> None: ...


_living: weakref.WeakSet[_Renewed] = weakref.WeakSet()


def renew_after_fork(thing: _Renewed) -> None:
    """Has `thing._after_fork_in_child()` called in every forked child for as long as `thing` lives."""
    _living.add(thing)


def _renew_all() -> None:
    for thing in list(_living):
        thing._after_fork_in_child()  # noqa: SLF001 - the one caller that this method exists for


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)

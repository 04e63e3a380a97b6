"""Work that its library does not bound in time: on a thread that can be left behind."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from interceptors.waiting import settle

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def in_time(work: Callable[[], T], seconds: float | None, name: str, *, daemon: bool = True) -> T:
    """What `work()` returns or raises, if it ends within `seconds`; else it goes on by itself, on a thread `name`.

    Args:
        work: Is called once.
        seconds: The longest to wait for it; None waits for as long as nothing, such as Ctrl-C, interrupts.
        name: The thread's.
        daemon: Whether the program may end before it has.

    Raises:
        TimeoutError: It did not end in time.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the outcome is awaited
            settle(outcome, error)
        else:
            settle(outcome, result)

    try:
        threading.Thread(target=run, name=name, daemon=daemon).start()
    except RuntimeError:
        # From Python 3.12 on, no thread can be started while the interpreter shuts down.
        return work()
    return outcome.result(seconds)

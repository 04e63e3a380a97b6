"""What the demo shows: live progress on a terminal, plain lines elsewhere, and a closing table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from rich.console import Console

    from interceptors import RefreshingTokenSource
    from interceptors.demo.record import Outcome, Record
    from interceptors.stats import SourceStats
    from interceptors.testing import FakeServer


class Progress:
    """Says what is happening.

    Args:
        console: Where.
        seconds: How long the session lasts.
    """

    def __init__(self, console: Console, seconds: float) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("{task.completed:4.0f} s"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=seconds)
        self._passed = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        """One line."""
        self._console.print(f"{self._passed:5.1f} s  {what}")

    def update(self, passed: float, record: Record, source: RefreshingTokenSource, server: FakeServer) -> None:
        """Moves the bar."""
        self._passed = passed
        stats = source.stats
        what = f"{record.calls} calls, {record.failed} failed, {server.refusals} refused, {stats.refreshes} refreshes"
        self._bar.update(self._task, completed=passed, description=what)


def closing_table(outcome: Sequence[Outcome], record: Record, stats: SourceStats, server: FakeServer) -> Table:
    """What became of every call."""
    table = Table(title="What became of every call, and of every message of the streams", title_justify="left")
    table.add_column("kind")
    for name in ("sent", "executed once", "lost", "doubled"):
        table.add_column(name, justify="right")
    for row in outcome:
        bad = "bold red" if row.lost or row.doubled else None
        table.add_row(row.kind, str(row.sent), str(row.once), str(row.lost), str(row.doubled), style=bad)
    retried = max(server.attempts - record.calls, 0)
    table.caption = (
        f"{record.calls} calls, {record.failed} failed; attempts: {server.refusals} refused, {retried} retried; "
        f"refreshes: {stats.proactive} proactive, {stats.mandatory} mandatory, {stats.reactive} reactive, "
        f"{stats.failures} failed; slowest call during a refresh: {record.slowest_during_a_refresh() * 1000:.0f} ms"
    )
    table.caption_justify = "left"
    return table

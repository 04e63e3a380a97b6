"""`interceptors demo`: a real session over real sockets, with all that can happen to its token."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from rich.console import Console

from interceptors import MemoryStore, OidcClient, RefreshingTokenSource, StaticTokenSource
from interceptors.demo.mishaps import Mishaps
from interceptors.demo.record import Record
from interceptors.demo.report import Progress, closing_table
from interceptors.demo.sessions import CONNECT_EXTRA, GRPC, session
from interceptors.demo.sessions import flavours as those_there_are
from interceptors.testing import FakeIssuer, FakeServer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interceptors import Session, TokenSource

TOKEN_SECONDS = 4.0
_MOST_ERRORS = 5


def run(seconds: float, flavours: Sequence[str] = (), *, without: bool) -> int:
    """Runs a session of so many seconds in each of the `flavours` (default: all).

    Returns the exit code: 1 if anything was lost or doubled, or a flavour could not be shown, else 0.
    """
    console = Console()
    chosen = dict.fromkeys(flavours or those_there_are())
    left_out = "" if flavours or len(chosen) > len(GRPC) else f' (Connect: install the extra "{CONNECT_EXTRA}")'
    with FakeIssuer(access_token_lifetime=TOKEN_SECONDS) as issuer, FakeServer(issuer, max_workers=128) as server:
        record = Record()
        client = OidcClient(issuer.url, issuer.client_id)

        def refresh(session: Session | None) -> Session:
            with record.refreshing():
                return client.refresh(session)

        first = issuer.session()
        with RefreshingTokenSource(MemoryStore(first), refresh) as refreshing:
            source: TokenSource = StaticTokenSource(first.token) if without else refreshing
            console.print(
                f"{'The old way: a token that is fetched once' if without else 'Every call carries a valid token'}; "
                f"tokens live {TOKEN_SECONDS:g} s, the session {seconds:g} s; flavours: {', '.join(chosen)}{left_out}."
            )
            stop = threading.Event()

            def show(flavour: str) -> None:
                with record.noting_what_breaks(flavour):
                    session(flavour, server, source, record, stop)

            threads = [threading.Thread(target=show, args=(flavour,), name=flavour) for flavour in chosen]
            started = time.monotonic()
            try:
                for thread in threads:
                    thread.start()
                with Progress(console, seconds) as progress:
                    mishaps = Mishaps(issuer, server, source, seconds, progress.say)
                    while (passed := time.monotonic() - started) < seconds:
                        mishaps.until(passed)
                        progress.update(passed, record, refreshing, server)
                        time.sleep(0.1)
                mishaps.over()
            finally:
                # Also after Ctrl-C, or when nobody reads the output any more: the program waits for these threads.
                stop.set()
                for thread in threads:
                    if thread.is_alive():
                        thread.join(30)
            outcome = record.outcome(server.calls)
            console.print(closing_table(outcome, record, refreshing.stats, server))
            for error, count in record.errors.most_common(_MOST_ERRORS):
                console.print(f"failed {count} times: {error}", style="red", markup=False, highlight=False)
    lost, doubled = sum(row.lost for row in outcome), sum(row.doubled for row in outcome)
    idle = [flavour for flavour in chosen if not any(row.kind.startswith(f"{flavour}:") for row in outcome)]
    for flavour in idle:
        console.print(f"[bold red]{flavour} made no call[/]")
    if lost or doubled:
        console.print(f"[bold red]{lost} lost, {doubled} doubled[/]")
    if lost or doubled or idle or record.broken:
        return 1
    console.print("[bold green]Nothing was lost, nothing was doubled.[/]")
    return 0

"""`interceptors status`, `token` and `refresh`: what becomes of a session meanwhile."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from interceptors.cli.keeping import keep, refreshed
from interceptors.cli.settings import LOCK_SECONDS, Settings, printable, with_settings
from interceptors.errors import LOGIN_HINT, LoginRequired, StoreError
from interceptors.freshness import freshness
from interceptors.timelimit import in_time

if TYPE_CHECKING:
    from interceptors.session import Session
    from interceptors.stores.base import SessionStore

_WINDOW_SECONDS = timedelta(minutes=15).total_seconds()


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@with_settings(identity=False)
def status(settings: Settings, *, as_json: bool) -> None:
    """Who is logged in, and for how long. The exit code is 1 if there is no valid session."""
    store = settings.open_store()
    try:
        session = store.load()
    except StoreError as error:
        if as_json:
            click.echo(json.dumps({**_report(None, settings, store), "error": str(error)}, indent=2))
        raise
    report = _report(session, settings, store)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    elif session is None:
        click.echo(f"Nobody is logged in (profile {settings.profile}, {store}): {LOGIN_HINT}")
    else:
        for name, value in _lines(report).items():
            click.echo(f"{name:<10}{printable(value)}")
    raise SystemExit(0 if report["valid"] else 1)


@click.command()
@click.option("--force", is_flag=True, help="Print it to a terminal, too.")
@with_settings()
def token(settings: Settings, *, force: bool) -> None:
    """Print an access token that is fresh, for curl or grpcurl.

    For example: curl -H "authorization: Bearer $(interceptors token)" https://api.example.com
    """
    if sys.stdout is None:
        msg = "there is no output to print the token to: use it in $(interceptors token)"
        raise click.ClickException(msg)
    if sys.stdout.isatty() and not force:
        msg = "a token does not belong on a screen: use it in $(interceptors token), or pass --force"
        raise click.ClickException(msg)
    from interceptors.refreshing import RefreshingTokenSource

    store = settings.open_store()
    client = settings.client_of(_stored(store, settings))

    def refresh(session: Session | None) -> Session:
        return client.refresh(None) if session is None else refreshed(client, store, session)

    with RefreshingTokenSource(store, refresh) as source:
        source.token()
        source.peek()  # begins a refresh if one is due by now; leaving waits for it
    session = source.session
    assert session is not None
    click.echo(session.access_token)


@click.command()
@with_settings()
def refresh(settings: Settings) -> None:
    """Refresh the access token now, whatever is left of it."""
    store = settings.open_store()

    def refresh_and_keep() -> Session:
        with store.lock(LOCK_SECONDS):
            session = _stored(store, settings)
            session = refreshed(settings.client_of(session), store, session)
            keep(store, session)
            return session

    # Ctrl-C ends the command, but not between the issuer's answer and the save: that would be to lose the session.
    session = in_time(refresh_and_keep, None, "interceptors-refresh", daemon=False)
    lasts = "" if session.expires_at is None else f"; it is good for {_for(session.expires_at - time.time())}"
    click.echo(f"Token refreshed{lasts}.", err=True)


def _stored(store: SessionStore, settings: Settings) -> Session:
    session = store.load()
    if session is None:
        msg = f"nobody is logged in (profile {settings.profile}): {LOGIN_HINT}"
        raise LoginRequired(msg)
    return session


def _report(session: Session | None, settings: Settings, store: SessionStore) -> dict[str, Any]:
    report: dict[str, Any] = {"valid": False, "profile": settings.profile, "store": str(store)}
    if session is None:
        return report
    now = time.time()
    fresh_until, _, expires_at = freshness(session, _WINDOW_SECONDS, 0.0)
    refreshable = session.refresh_token is not None
    expires_in = None if session.expires_at is None else session.expires_at - now
    return {
        **report,
        "valid": refreshable or now < expires_at,
        "identity": session.identity,
        "name": session.name,
        "email": session.email,
        "issuer": session.issuer,
        "subject": session.subject,
        "client_id": session.client_id,
        "scope": session.scope,
        "expires_at": session.expires_at,
        "expires_in": expires_in,
        "refreshes_in": max(fresh_until - now, 0.0) if refreshable and expires_in is not None else None,
    }


def _lines(report: dict[str, Any]) -> dict[str, str]:
    who = " ".join(filter(None, [report["name"], f"<{report['email']}>" if report["email"] else None]))
    lines = {
        "user": who,
        "identity": report["identity"],
        "client": report["client_id"],
        "scope": report["scope"],
        "token": "of unknown lifetime",
        "store": report["store"],
    }
    expires_in, refreshes_in = report["expires_in"], report["refreshes_in"]
    if expires_in is not None:
        at = _date(report["expires_at"])
        lines["token"] = f"expires in {_for(expires_in)} ({at})" if expires_in > 0 else f"expired at {at}"
        if refreshes_in is not None:
            lines["refresh"] = f"due in {_for(refreshes_in)}" if refreshes_in > 0 else "due with the next call"
        else:
            lines["refresh"] = "none: there is no refresh token"
    return {name: line for name, line in lines.items() if line}


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "a date that no calendar has"


def _for(seconds: float) -> str:
    whole = max(int(seconds), 0)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"

"""`interceptors login` and `interceptors logout`: how a session begins and ends."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from interceptors.cli.keeping import keep, prove_writable
from interceptors.cli.settings import LOCK_SECONDS, Seconds, Settings, printable, with_settings
from interceptors.errors import LOGIN_HINT, AuthError, StoreError
from interceptors.stores.format import UnreadableSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from interceptors.oidc.client import OidcClient
    from interceptors.oidc.device import DeviceLogin
    from interceptors.session import Session
    from interceptors.stores.base import SessionStore


@click.command()
@click.option("--device", is_flag=True, help="Log in on another device, with a code.")
@click.option("--scope", envvar="INTERCEPTORS_SCOPE", help="What to ask for, separated by spaces.")
@click.option(
    "--timeout", type=Seconds(min=0, min_open=True), default=300.0, show_default=True, help="Seconds to wait."
)
@with_settings()
def login(settings: Settings, timeout: float, *, device: bool) -> None:
    """Log in, with the browser or (--device) on any other device, and keep the session."""
    client, store = settings.client(), settings.open_store()
    prove_writable(store)  # before anybody logs in in vain
    if device:
        with _waiting() as prompt:
            session = client.device_login(prompt, timeout=timeout)
    else:
        session = client.login(timeout=timeout)
    try:
        _keep_under_lock(store, session)
    except StoreError as error:
        msg = f"{error}; {_revoked(client, session)}"
        raise StoreError(msg) from error
    who = printable(session.name or session.email or session.subject or "")
    click.echo(f"Logged in{f' as {who}' if who else ''} at {session.issuer}; the session is kept in {store}.", err=True)


@click.command()
@with_settings()
def logout(settings: Settings) -> None:
    """Revoke the session at its issuer, and forget it."""
    store = settings.open_store()
    with store.lock(LOCK_SECONDS):
        try:
            session = store.load()
        except UnreadableSession as error:
            click.echo(f"Warning: {error}", err=True)
            store.clear()
            click.echo("The session was removed, and could not be revoked.", err=True)
            return
        if session is None:
            click.echo(f"Nobody is logged in (profile {settings.profile}).", err=True)
            return
        try:
            settings.client_of(session).revoke(session)
        except AuthError as error:
            click.echo(f"Warning: the session may still be valid at its issuer: {error}", err=True)
        store.clear()
    click.echo("Logged out.", err=True)


def _keep_under_lock(store: SessionStore, session: Session) -> None:
    try:
        with store.lock(LOCK_SECONDS):
            keep(store, session)
    except StoreError:
        # Whoever holds the lock looks for a login that did not wait for it.
        store.save(session)


def _revoked(client: OidcClient, session: Session) -> str:
    try:
        client.revoke(session)
    except AuthError:
        return f"what was logged in may still be valid at {session.issuer}"
    return f"so the new session was revoked: then {LOGIN_HINT} again"


@contextmanager
def _waiting() -> Iterator[Callable[[DeviceLogin], object]]:
    """A prompt for a device login, and an indicator while it is waited for."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    with console.status("Waiting for the login ...") as status:
        status.stop()

        def prompt(told: DeviceLogin) -> None:
            click.echo(f"Open {told.verification_uri} and enter the code {told.user_code}", err=True)
            if told.verification_uri_complete:
                click.echo(f"or open {told.verification_uri_complete}", err=True)
            status.start()

        yield prompt

"""Where a command's settings come from: flags, then the environment, then the configuration file."""

from __future__ import annotations

import functools
import math
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from interceptors.errors import AuthError

if TYPE_CHECKING:
    from collections.abc import Callable

    from interceptors.oidc.client import OidcClient
    from interceptors.session import Session
    from interceptors.stores.base import SessionStore

F = TypeVar("F", bound="Callable[..., Any]")


class Seconds(click.FloatRange):
    """A number of seconds that can be waited for."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType.convert`; also refuses what is not finite."""
        seconds = float(super().convert(value, param, ctx))
        return seconds if math.isfinite(seconds) else self.fail(f"{value!r} is no number of seconds.", param, ctx)


LOCK_SECONDS: Final = 30.0
"""The longest that a command waits for another process that is refreshing the same session."""

_KEYS: Final = ("issuer", "client_id", "scope", "profile", "store")
_SECRET: Final = "INTERCEPTORS_CLIENT_SECRET"  # noqa: S105 - where it is, not what


@dataclass(frozen=True)
class Settings:
    """What a command works with."""

    issuer: str | None
    client_id: str | None
    scope: str | None
    profile: str
    store: str

    def open_store(self) -> SessionStore:
        """The store that is meant."""
        from interceptors import FileStore, KeyringStore

        kind, _, rest = self.store.partition(":")
        kind = kind.lower()
        try:
            if self.store == "keyring":
                return KeyringStore(self.profile)
            if kind == "file":
                return FileStore(rest or _default_file(self.profile))
            if kind in {"redis", "rediss", "unix"}:
                return _redis_store(f"{kind}:{rest}", self.profile)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        # A URL may hold a password.
        shown = f"{kind}://..." if "://" in self.store else repr(self.store)
        msg = f"store must be keyring, file, file:PATH or a redis:// URL, not {shown}"
        raise click.UsageError(msg)

    def client(self) -> OidcClient:
        """The client that logs in."""
        if not self.issuer or not self.client_id:
            missing = "--issuer" if not self.issuer else "--client-id"
            msg = (
                f"{missing} is missing: pass it, set INTERCEPTORS_{missing[2:].replace('-', '_').upper()}, "
                f"or write it into {config_file()}"
            )
            raise click.UsageError(msg)
        return _client(self.issuer, self.client_id, self.scope)

    def client_of(self, session: Session) -> OidcClient:
        """The client that `session` belongs to; a usage error if another one is asked for."""
        for name, wanted, owner in (
            ("issuer", self.issuer, session.issuer),
            ("client", self.client_id, session.client_id),
        ):
            if wanted and owner and wanted != owner:
                msg = (
                    f"the session of profile {self.profile!r} is one of the {name} {owner}, not {wanted}: "
                    "choose another --profile, or log in again"
                )
                raise click.ClickException(msg)
        issuer, client_id = session.issuer or self.issuer, session.client_id or self.client_id
        if not issuer or not client_id:
            return self.client()
        return _client(issuer, client_id, self.scope)


def with_settings(*, identity: bool = True) -> Callable[[F], F]:
    """Gives a command the shared options; it is called with `settings`, and its errors become one line."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        @click.pass_context
        def command(ctx: click.Context, /, verbose: bool, **given: Any) -> Any:  # noqa: FBT001 - click's
            try:
                settings = _resolved(ctx, {key: given.pop(key, None) for key in _KEYS})
                return ctx.invoke(function, settings=settings, **given)
            except AuthError as error:
                raise click.ClickException(_said(error, verbose=verbose)) from error

        options = [
            click.option("--profile", envvar="INTERCEPTORS_PROFILE", help="Which session.  [default: default]"),
            click.option(
                "--store",
                envvar="INTERCEPTORS_STORE",
                help="keyring, file, file:PATH, or redis://HOST.  [default: keyring]",
            ),
            click.option("--verbose", "-v", is_flag=True, help="Say also what led to an error."),
        ]
        if identity:
            options = [
                click.option("--issuer", envvar="INTERCEPTORS_ISSUER", help="The OpenID issuer, an https URL."),
                click.option("--client-id", envvar="INTERCEPTORS_CLIENT_ID", help="The client at the issuer."),
                *options,
            ]
        wrapped: Any = command
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped  # type: ignore[no-any-return]

    return decorate


def printable(text: str) -> str:
    """`text` without what a terminal would act upon, or that cannot be written: an issuer could say anything."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def config_file() -> Path:
    """The configuration file, which need not exist."""
    import platformdirs

    return Path(platformdirs.user_config_dir("interceptors", appauthor=False)) / "config.toml"


def _resolved(ctx: click.Context, given: dict[str, str | None]) -> Settings:
    config = _config()
    profile = given["profile"] or config.get("profile") or "default"
    config = {**config, **config.get("profiles", {}).get(profile, {})}
    found = {key: given[key] or config.get(key) for key in _KEYS}
    store = found["store"] or "keyring"
    source = ctx.get_parameter_source("store")
    if source is click.core.ParameterSource.COMMANDLINE and _holds_password(store):
        msg = "everybody on this machine can see a password on the command line: put the URL into INTERCEPTORS_STORE"
        raise click.UsageError(msg)
    return Settings(found["issuer"], found["client_id"], found["scope"], profile, store)


def _holds_password(url: str) -> bool:
    # Not by urlsplit, which finds none behind a character that should have been quoted.
    user, at, _ = url.partition("://")[2].rpartition("@")
    return bool(at and ":" in user) or "password=" in url


def _config() -> dict[str, Any]:
    file = config_file()
    try:
        config = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"{file} cannot be read: {error}"
        raise click.ClickException(msg) from error
    profiles = config.get("profiles", {})
    if not isinstance(profiles, dict):
        msg = f"{file}: profiles must be tables, such as [profiles.work]"
        raise click.ClickException(msg)
    tables = [("", {key: value for key, value in config.items() if key != "profiles"})]
    tables += [(f" in [profiles.{name}]", table) for name, table in profiles.items()]
    for where, table in tables:
        if not isinstance(table, dict):
            msg = f"{file}: profiles must be tables, such as [profiles.work]"
            raise click.ClickException(msg)
        allowed = set(_KEYS) if not where else set(_KEYS) - {"profile"}
        for key, value in table.items():
            if key == "client_secret":
                msg = f"{file}: a client secret does not belong into a file{where}: set {_SECRET}"
                raise click.ClickException(msg)
            if key not in allowed:
                msg = f"{file}: unknown key {key!r}{where}; there are {', '.join(sorted(allowed))}"
                raise click.ClickException(msg)
            if not isinstance(value, str):
                msg = f"{file}: {key}{where} must be a string"
                raise click.ClickException(msg)
    return config


def _client(issuer: str, client_id: str, scope: str | None) -> OidcClient:
    from interceptors.oidc.client import OidcClient

    options: dict[str, Any] = {"scope": scope} if scope else {}
    try:
        return OidcClient(issuer, client_id, client_secret=os.environ.get(_SECRET) or None, **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _default_file(profile: str) -> Path:
    import platformdirs

    if not profile.replace("-", "").replace("_", "").replace(".", "").isalnum():
        msg = (
            f"profile {profile!r} cannot be a file's name: use letters, digits, '-', '_' and '.', or --store file:PATH"
        )
        raise ValueError(msg)
    return Path(platformdirs.user_state_dir("interceptors", appauthor=False)) / f"session-{profile}.json"


def _redis_store(url: str, profile: str) -> SessionStore:
    try:
        import redis
    except ImportError as error:
        msg = "Redis needs an extra: pip install 'interceptors[redis]'"
        raise click.ClickException(msg) from error
    from interceptors.stores.redis import RedisStore

    try:
        client = redis.Redis.from_url(url)
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # connects later, but looks at its options now
    except (ValueError, TypeError):
        # Neither the URL nor what is said of it is shown, as it may hold a password.
        msg = "store is no URL of a Redis: redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], each part percent-encoded"
        raise click.UsageError(msg) from None
    return RedisStore(client, f"interceptors:{profile}")


def _said(error: BaseException, *, verbose: bool) -> str:
    lines = [" ".join(str(error).split())]
    cause = error.__cause__
    while verbose and cause is not None:
        lines.append(f"  because of {type(cause).__name__}: {' '.join(str(cause).split())}")
        cause = cause.__cause__
    return "\n".join(lines)

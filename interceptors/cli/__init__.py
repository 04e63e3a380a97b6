"""The command line `interceptors`."""

from __future__ import annotations

import errno
import io
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from interceptors.cli.completion import completion
from interceptors.cli.demo import demo
from interceptors.cli.login import login, logout
from interceptors.cli.session import refresh, status, token

if TYPE_CHECKING:
    from collections.abc import Iterator


class _OneLineErrors(click.Group):
    """Says what is wrong with a command in one line, without its usage around it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # shows the help
        with _in_one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        raise click.UsageError(" ".join(error.format_message().split())) from error
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # whoever read the output has gone: click ends without a word
        msg = f"the system says {error.strerror or type(error).__name__!r}: see whether the output can be written"
        raise click.ClickException(msg) from error


@click.group(
    cls=_OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Each option may also come from the environment (INTERCEPTORS_ISSUER, INTERCEPTORS_CLIENT_ID, "
        "INTERCEPTORS_SCOPE, INTERCEPTORS_PROFILE, INTERCEPTORS_STORE; INTERCEPTORS_CLIENT_SECRET only from there) or "
        "from config.toml in the platform's configuration directory, in that order."
    ),
)
@click.version_option(package_name="interceptors")
def main() -> None:
    """Bearer tokens that outlive the session: log in once, and every call carries a valid token."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name that this terminal cannot show is no reason to fail


for command in (login, status, token, refresh, logout, demo, completion):
    main.add_command(command)

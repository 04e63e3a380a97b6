"""`interceptors demo`."""

from __future__ import annotations

import os

import click

from interceptors.cli.settings import Seconds


@click.command()
@click.option("--seconds", type=Seconds(min=5), default=20.0, show_default=True, help="How long it lasts.")
@click.option(
    "--flavour",
    "flavours",
    type=click.Choice(["grpc", "aio", "connect", "connect-aio"]),
    multiple=True,
    help="Only this one; may be given again.  [default: all]",
)
@click.option("--without", is_flag=True, help="The old way: a token that is fetched once.")
def demo(seconds: float, flavours: tuple[str, ...], *, without: bool) -> None:
    """A long session in short: watch it survive its token again and again.

    Starts an issuer whose tokens live a few seconds, and a server that checks them. Meanwhile tokens expire, one is
    revoked, and (in sessions of 20 seconds or more) the issuer goes down for a while. The exit code is 1 if anything
    was lost or doubled.
    """
    # gRPC's core tells of connections that the demo closes on purpose.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from interceptors.demo import run
    from interceptors.demo.sessions import CONNECT_EXTRA
    from interceptors.demo.sessions import flavours as those_there_are

    if not set(flavours) <= set(those_there_are()):
        msg = f"Connect needs a server that speaks it: pip install 'interceptors[{CONNECT_EXTRA}]'"
        raise click.UsageError(msg)
    raise SystemExit(run(seconds, flavours, without=without))

"""`interceptors completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete this command.

    For example: eval "$(interceptors completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None
    main = ctx.find_root().command
    click.echo(kind(main, {}, "interceptors", "_INTERCEPTORS_COMPLETE").source())

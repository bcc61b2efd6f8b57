"""`--version` of both commands: the package's version, and the version of the wire that it speaks.

Rules kept here: it costs no imports before it is asked for.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

Command = TypeVar("Command", bound="Callable[..., object]")


def version_line(program: str) -> str:
    """What `PROGRAM --version` prints; two programs talk if their wire versions are equal."""
    from snowskin.kvstore.messages import WIRE_VERSION

    return f"{program}, version {version('snowskin')}, wire version {WIRE_VERSION} (snowskin.v1)"


def version_option(program: str) -> Callable[[Command], Command]:
    """Gives a command the option `--version`."""

    def say(ctx: click.Context, _param: click.Parameter, is_asked: bool) -> None:
        if is_asked and not ctx.resilient_parsing:
            click.echo(version_line(program))
            ctx.exit()

    return click.option(
        "--version",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=say,
        help="Versions of the package and of the wire.",
    )

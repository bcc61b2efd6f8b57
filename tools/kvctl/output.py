"""How every kvctl command asks and answers: one table or one JSON document on stdout, one line of trouble on stderr.

Rules kept here: exit status 0 answered, 1 unreachable or failed, 2 usage (click's own). JSON is for programs: plain
numbers, names as in the code, bytes and seconds as they are; tables are for people and may change.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Table

from snowskin.kvstore.config import setting
from snowskin.kvstore.errors import BadSetting
from snowskin.tools.kvctl.admin import AdminClient
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Answer = TypeVar("Answer")
P = ParamSpec("P")
# Wider than any table: a cut name or state is no answer. A narrow terminal wraps the lines.
MAX_COLUMNS = 1000


@dataclass(frozen=True, kw_only=True)
class KvctlSettings:
    """Whom to ask, and how to answer."""

    conductor: str = setting("127.0.0.1:7000", help="host:port of the conductor's gRPC.")
    timeout_s: float = setting(
        5.0, help="Seconds that the conductor, or a node, may take for one answer."
    )
    json: bool = setting(False, help="One JSON document instead of a table.")

    def __post_init__(self) -> None:
        """Refuses an address without a port."""
        host, colon, port = self.conductor.rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and int(port) <= 65_535):
            raise BadSetting(
                f"conductor {self.conductor!r} is not host:port",
                hint="`snowskin up` prints the conductor's gRPC address",
            )
        if not self.timeout_s > 0:
            raise BadSetting(f"timeout_s is {self.timeout_s}", hint="give seconds > 0")


def with_settings(command: Callable[Concatenate[KvctlSettings, P], None]) -> Callable[P, None]:
    """Hands the group's settings to a command, which takes `--json` behind its name too."""

    def on_json(ctx: click.Context, _param: click.Parameter, as_json: bool) -> None:
        settings = ctx.find_object(KvctlSettings)
        if as_json and settings is not None:
            ctx.obj = dataclasses.replace(settings, json=True)

    def run(*args: P.args, **values: P.kwargs) -> None:
        command(click.get_current_context().obj, *args, **values)

    functools.update_wrapper(run, command)
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=on_json,
        help="As the option of kvctl.",
    )(run)


def ask(settings: KvctlSettings, question: Callable[[AdminClient], Awaitable[Answer]]) -> Answer:
    """Asks the conductor; an error ends the command with exit status 1."""

    async def call() -> Answer:
        async with AdminClient(settings.conductor, timeout_s=settings.timeout_s) as admin:
            return await question(admin)

    try:
        return asyncio.run(call())
    except SnowskinError as error:
        print(f"kvctl: {error}", file=sys.stderr)
        raise click.exceptions.Exit(1) from error


def print_json(answer: Any) -> None:
    """Prints a dataclass, or a sequence of them, as one JSON document."""
    document = (
        [dataclasses.asdict(item) for item in answer]
        if isinstance(answer, tuple)
        else dataclasses.asdict(answer)
    )
    print_document(document)


def print_document(document: Any) -> None:
    """Prints what may hold dataclasses and bytes, which become hex, as one JSON document."""
    print(json.dumps(document, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"a {type(value).__name__} has no place in an answer")


def table(*columns: str, title: str = "") -> Table:
    """An empty table; a column whose name starts with `#` holds numbers and leans right."""
    made = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        numeric = column.startswith("#")
        made.add_column(
            column.removeprefix("#"), justify="right" if numeric else "left", no_wrap=True
        )
    return made


def print_table(*tables: Table) -> None:
    """Prints tables whole, coloured only on a terminal."""
    console = Console(width=MAX_COLUMNS)
    for made in tables:
        console.print(made)


def nbytes_text(nbytes: float) -> str:
    """A size for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def age_text(seconds: float | None) -> str:
    """How long ago, for people; a dash where it never was."""
    return "-" if seconds is None else f"{seconds:.1f} s ago"


def duration_text(seconds: float) -> str:
    """A length of time for people: `1.5 s`, `3.2 min`, `4.0 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def rate_text(value: float, unit: str) -> str:
    """A measured rate for people; a dash while it is unknown."""
    return f"{value:,.0f} {unit}" if value > 0 else "-"

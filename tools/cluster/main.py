"""`snowskin`: starts any role, a whole cluster, or the demonstration.

Rules kept here: help costs no imports: a command's module is loaded when the command is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import click

from snowskin.tools.version import version_option

if TYPE_CHECKING:
    from collections.abc import Iterator

EPILOG = """
One TOML file serves all roles: --config FILE, or SNOWSKIN_CONFIG. Flags beat environment variables, and those
beat the file.

Exit status: 0 done or drained, 1 failed at run time, 2 usage or a setting that cannot work.

\b
Examples:
  snowskin demo
  snowskin up --model models/tiny
  snowskin doctor
  snowskin config print node --config snowskin.toml
  snowskin node --help
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lazy:
    """Where a command is; `made` if a function there makes it."""

    module: str
    name: str
    made: bool
    help: str


COMMANDS = {
    "up": _Lazy(
        module="snowskin.tools.cluster.up",
        name="up",
        made=False,
        help="A whole cluster on this host, until Ctrl-C.",
    ),
    "demo": _Lazy(
        module="snowskin.tools.cluster.demo",
        name="demo",
        made=False,
        help="The main job, shown and checked.",
    ),
    "node": _Lazy(
        module="snowskin.tools.cluster.roles", name="node", made=True, help="A store node."
    ),
    "conductor": _Lazy(
        module="snowskin.tools.cluster.roles",
        name="conductor",
        made=True,
        help="The conductor: HTTP, placement.",
    ),
    "prefill": _Lazy(
        module="snowskin.tools.cluster.roles", name="prefill", made=True, help="A prefill engine."
    ),
    "decode": _Lazy(
        module="snowskin.tools.cluster.roles", name="decode", made=True, help="A decode engine."
    ),
    "doctor": _Lazy(
        module="snowskin.tools.doctor.main",
        name="doctor",
        made=False,
        help="Can this host run it? What is wrong, and what to do.",
    ),
    "config": _Lazy(
        module="snowskin.tools.cluster.config_command",
        name="config",
        made=False,
        help="Print or check a role's settings.",
    ),
}


class LazyGroup(click.Group):
    """A group whose commands are imported one by one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in reading order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command, None where there is none of that name."""
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        with _ctrl_c_ends_it():
            found = getattr(importlib.import_module(lazy.module), lazy.name)
        return cast("click.Command", found() if lazy.made else found)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in COMMANDS.items()])


@contextlib.contextmanager
def _ctrl_c_ends_it() -> Iterator[None]:
    """For imports, which leave nothing behind: here SIGINT ends the process at once.

    Python's own handler raises wherever the program is, also where exceptions are printed and forgotten, as in the
    callback of an import's lock: then a Ctrl-C is lost, and what was to be stopped starts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@click.command(
    cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@version_option("snowskin")
def cli() -> None:
    """Snowskin: transfer and storage of KV caches for LLM inference."""


def main() -> None:
    """Entry point of the `snowskin` script."""
    cli(prog_name="snowskin")


if __name__ == "__main__":
    main()

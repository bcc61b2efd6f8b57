"""The commands that run one role: node, conductor, prefill, decode.

Rules kept here: what a role needs is imported when its command is asked for, so that `snowskin --help` needs no
torch and a node needs no model code.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import click

from snowskin.kvstore.config import options, setting
from snowskin.kvstore.role import RoleSettings, Stop, run_role

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Settings = TypeVar("Settings", bound=RoleSettings)


def role_command(
    role: str,
    settings_class: type[Settings],
    serve: Callable[[Settings, Stop], Awaitable[None]],
    *,
    help: str,
) -> click.Command:
    """A command with the options of `settings_class` that serves until a signal."""

    @click.command(role, help=help)
    @options(settings_class, table=role)
    def command(settings: Settings) -> None:
        sys.exit(run_role(role, settings, serve))

    return command


def node() -> click.Command:
    """`snowskin node`."""
    from snowskin.kvstore.node.daemon import NodeSettings, serve_node

    return role_command(
        "node",
        NodeSettings,
        serve_node,
        help="""A store node: this host's pools of KV blocks, behind gRPC and a Unix socket.

        \b
        Example:
          snowskin node --port 7100 --door /run/snowskin/node.sock --dram-nbytes 8GiB
        """,
    )


def conductor() -> click.Command:
    """`snowskin conductor`."""
    from snowskin.engines.conductor.daemon import ConductorSettings, serve_conductor

    return role_command(
        "conductor",
        ConductorSettings,
        serve_conductor,
        help="""The conductor: places every request; OpenAI-compatible HTTP and gRPC.

        \b
        Example:
          snowskin conductor --port 7000 --http-port 8000 --model models/tiny
        """,
    )


_ENGINE_HELP = """{what}

\b
Example:
  snowskin {role} --model models/tiny --conductor 127.0.0.1:7000 \\
      --node unix:/run/snowskin/node.sock --node-address 127.0.0.1:7100
"""


def prefill() -> click.Command:
    """`snowskin prefill`."""
    from snowskin.engines.daemon import EngineSettings, serve_engine

    @dataclass(frozen=True, kw_only=True)
    class PrefillSettings(EngineSettings):
        role: Literal["prefill"] = setting("prefill", help="Said by the command already.")

    what = "A prefill engine: computes prompts and publishes their KV blocks."
    help_text = _ENGINE_HELP.format(what=what, role="prefill")
    return role_command("prefill", PrefillSettings, serve_engine, help=help_text)


def decode() -> click.Command:
    """`snowskin decode`."""
    from snowskin.engines.daemon import EngineSettings, serve_engine

    @dataclass(frozen=True, kw_only=True)
    class DecodeSettings(EngineSettings):
        role: Literal["decode"] = setting("decode", help="Said by the command already.")

    what = "A decode engine: pulls KV blocks and generates."
    help_text = _ENGINE_HELP.format(what=what, role="decode")
    return role_command("decode", DecodeSettings, serve_engine, help=help_text)

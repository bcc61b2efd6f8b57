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

    from snowskin.engines.conductor.daemon import ConductorSettings
    from snowskin.engines.daemon import EngineSettings
    from snowskin.kvstore.node.daemon import NodeSettings

Settings = TypeVar("Settings", bound=RoleSettings)


def node_settings() -> type[NodeSettings]:
    """The settings of a node."""
    from snowskin.kvstore.node.daemon import NodeSettings

    return NodeSettings


def conductor_settings() -> type[ConductorSettings]:
    """The settings of a conductor."""
    from snowskin.engines.conductor.daemon import ConductorSettings

    return ConductorSettings


def prefill_settings() -> type[EngineSettings]:
    """The settings of a prefill engine."""
    from snowskin.engines.daemon import EngineSettings

    @dataclass(frozen=True, kw_only=True)
    class PrefillSettings(EngineSettings):
        role: Literal["prefill"] = setting("prefill", help="Said by the command already.")

    return PrefillSettings


def decode_settings() -> type[EngineSettings]:
    """The settings of a decode engine."""
    from snowskin.engines.daemon import EngineSettings

    @dataclass(frozen=True, kw_only=True)
    class DecodeSettings(EngineSettings):
        role: Literal["decode"] = setting("decode", help="Said by the command already.")

    return DecodeSettings


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
    from snowskin.kvstore.node.daemon import serve_node

    return role_command(
        "node",
        node_settings(),
        serve_node,
        help="""A store node: this host's pools of KV blocks, behind gRPC and a Unix socket.

        \b
        Example:
          snowskin node --port 7100 --door /run/snowskin/node.sock --dram-nbytes 8GiB
        """,
    )


def conductor() -> click.Command:
    """`snowskin conductor`."""
    from snowskin.engines.conductor.daemon import serve_conductor

    return role_command(
        "conductor",
        conductor_settings(),
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
    from snowskin.engines.daemon import serve_engine

    what = "A prefill engine: computes prompts and publishes their KV blocks."
    help_text = _ENGINE_HELP.format(what=what, role="prefill")
    return role_command("prefill", prefill_settings(), serve_engine, help=help_text)


def decode() -> click.Command:
    """`snowskin decode`."""
    from snowskin.engines.daemon import serve_engine

    what = "A decode engine: pulls KV blocks and generates."
    help_text = _ENGINE_HELP.format(what=what, role="decode")
    return role_command("decode", decode_settings(), serve_engine, help=help_text)

"""A prefill or decode process that does not check what it pulls: it shows what checking prevents.

Run by a cluster in place of the real one: `python -m tests.support.engine_unverified prefill ...`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from snowskin.engines.daemon import EngineSettings, serve_engine
from snowskin.kvstore.config import setting
from snowskin.tools.cluster.roles import role_command

if TYPE_CHECKING:
    from snowskin.kvstore.role import Stop


@dataclass(frozen=True, kw_only=True)
class PrefillSettings(EngineSettings):
    role: Literal["prefill"] = setting("prefill", help="Said by the command already.")


@dataclass(frozen=True, kw_only=True)
class DecodeSettings(EngineSettings):
    role: Literal["decode"] = setting("decode", help="Said by the command already.")


async def serve_unverified(settings: EngineSettings, stop: Stop) -> None:
    await serve_engine(settings, stop, verify=False)


@click.group()
def main() -> None:
    """An engine that believes every byte."""


main.add_command(role_command("prefill", PrefillSettings, serve_unverified, help="Prefill."))
main.add_command(role_command("decode", DecodeSettings, serve_unverified, help="Decode."))

if __name__ == "__main__":
    main()

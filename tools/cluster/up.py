"""`snowskin up`: a whole cluster on this host, until Ctrl-C."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from snowskin.kvstore.config import CONFIG_META, options
from snowskin.kvstore.telemetry import configure_logging
from snowskin.tools.cluster.demo_inputs import make_model, model_directory
from snowskin.tools.cluster.interrupts import Interrupted, run_interruptible
from snowskin.tools.cluster.local import LocalCluster
from snowskin.tools.cluster.up_settings import UpSettings
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from pathlib import Path

    from snowskin.tools.cluster.errors import ChildGivenUp


def forward_line(name: str, line: str) -> None:
    """Writes one line of a child to stderr, with its name before it."""
    print(f"{name:<12} | {line}", file=sys.stderr, flush=True)


async def _serve(settings: UpSettings, config: Path | None) -> ChildGivenUp:
    if not settings.model:
        directory = model_directory()
        print(f"no --model: taking the demonstration's random one, {directory}", flush=True)
        if not (directory / "config.json").is_file():
            await asyncio.to_thread(make_model, print)
        settings = dataclasses.replace(settings, model=str(directory))
    async with LocalCluster(settings, config=config, forward=forward_line) as cluster:
        print(f"OpenAI-compatible HTTP: http://{cluster.http_address}/v1")
        print(
            f"conductor: {cluster.conductor_address}   (kvctl --conductor {cluster.conductor_address} status)"
        )
        for node in cluster.nodes:
            print(f"{node.id or 'node'}: {node.address}   door {node.door}")
        print("Ctrl-C stops it.", flush=True)
        return await cluster.failed


@click.command(
    epilog="""
\b
Examples:
  snowskin up --model models/tiny
  snowskin up --model models/tiny --prefill 2 --decode 2 --dram-nbytes 8GiB --http-port 8080
  snowskin up --config snowskin.toml       (tables [up], [node], [conductor], [prefill], [decode])
"""
)
@options(UpSettings, table="up")
@click.pass_context
def up(ctx: click.Context, settings: UpSettings) -> None:
    """A whole cluster on this host, until Ctrl-C.

    Starts store nodes, a conductor, prefill and decode engines as processes on loopback, watches them, and starts
    again what dies. Each writes its log lines here, with its name before them.
    """
    configure_logging("up", level=settings.log_level, json=settings.log_json)
    try:
        error: SnowskinError = run_interruptible(_serve(settings, ctx.meta.get(CONFIG_META)))
    except Interrupted:
        return  # the way to end it
    except SnowskinError as failed:
        error = failed
    print(f"snowskin up: {error}", file=sys.stderr)
    ctx.exit(2 if error.status in ("INVALID_ARGUMENT", "FAILED_PRECONDITION") else 1)

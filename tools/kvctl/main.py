"""`kvctl`: the administrator's command line.

Rules kept here: it asks and shows, takes away only by a command that says so, and needs neither torch nor a model. A
command is a file of this folder.
"""

from __future__ import annotations

import click

from snowskin.kvstore.config import options
from snowskin.tools.kvctl.blocks import blocks
from snowskin.tools.kvctl.drain import drain
from snowskin.tools.kvctl.evict import evict
from snowskin.tools.kvctl.leases import leases
from snowskin.tools.kvctl.match import match
from snowskin.tools.kvctl.nodes import nodes
from snowskin.tools.kvctl.output import KvctlSettings
from snowskin.tools.kvctl.status import status
from snowskin.tools.kvctl.transports import transports
from snowskin.tools.version import version_option

EPILOG = """
Exit status: 0 answered, 1 the conductor or a node is unreachable or failed, 2 usage.

\b
Examples:
  kvctl --conductor 127.0.0.1:7000 status
  kvctl --json nodes | jq '.[].stat.num_blocks'
  SNOWSKIN_CONDUCTOR=127.0.0.1:7000 kvctl match --file prompt.txt
  kvctl blocks ls --leased --limit 20
  kvctl leases ls --client prefill-0
  kvctl transports --node 127.0.0.1:7101
  kvctl evict --all --node 127.0.0.1:7101
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@version_option("kvctl")
@options(KvctlSettings, table="kvctl")
@click.pass_context
def cli(ctx: click.Context, settings: KvctlSettings) -> None:
    """Looks into a running Snowskin cluster, and takes away what an operator names."""
    ctx.obj = settings


cli.add_command(status)
cli.add_command(nodes)
cli.add_command(match)
cli.add_command(blocks)
cli.add_command(leases)
cli.add_command(evict)
cli.add_command(drain)
cli.add_command(transports)


def main() -> None:
    """Entry point of the `kvctl` script."""
    cli(prog_name="kvctl")


if __name__ == "__main__":
    main()

"""`kvctl drain`: a node takes no new work, and serves what it has granted."""

from __future__ import annotations

import click

from snowskin.tools.kvctl.node_choice import ask_nodes, end_by
from snowskin.tools.kvctl.output import (
    KvctlSettings,
    print_document,
    print_table,
    table,
    with_settings,
)

COLUMNS = """
\b
Columns:
  node          that drains
  read leases   that have not ended
  write leases  that have not ended; those in quarantine wait for their writers' sessions
"""


@click.command(epilog=COLUMNS)
@click.argument("node")
@with_settings
def drain(settings: KvctlSettings, node: str) -> None:
    """Has NODE (host:port, or an id that the conductor knows) grant no new leases.

    What is leased is served to the end; engines find and publish elsewhere, or compute. There is no way back but to
    start the node anew. It can be stopped when no lease is left: `kvctl nodes` shows them. The node logs who asked.
    """
    answers = ask_nodes(settings, (node,), lambda admin: admin.drain())
    if settings.json:
        print_document([{"node": a.node, "draining": a.answer} for a in answers if a.answer])
    else:
        shown = table("node", "#read leases", "#write leases", title="draining")
        for answer in answers:
            if answer.answer is not None:
                shown.add_row(
                    answer.node,
                    str(answer.answer.num_read_leases),
                    str(answer.answer.num_write_leases),
                )
        if shown.row_count:
            print_table(shown)
    end_by(answers)

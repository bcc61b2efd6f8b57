"""`kvctl leases`: who holds what on the nodes, and an end to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from snowskin.kvstore.admin_messages import LeaseKind
from snowskin.tools.kvctl.node_choice import (
    NodeAnswer,
    ask_nodes,
    end_by,
    limit_option,
    listed_document,
    node_option,
    say_more,
)
from snowskin.tools.kvctl.output import (
    KvctlSettings,
    duration_text,
    nbytes_text,
    print_document,
    print_table,
    table,
    with_settings,
)

if TYPE_CHECKING:
    from rich.table import Table

    from snowskin.kvstore.admin_messages import LeaseInfo


@click.group()
def leases() -> None:
    """Who holds what on the nodes; and ends a lease."""


COLUMNS = """
\b
Columns:
  node    whose lease
  lease   its id, for `kvctl leases revoke`
  kind    read: blocks that stay; write: room that nobody else gets
  state   active; grace: run out, its holder may still be at the bytes; quarantined: a writer's, run out,
          room that comes back when the writer gives it up or its session ends
  client  who holds it, as it named itself
  blocks  how many it reads, or has still to commit
  bytes   their size
  age     since it was granted
  left    until its state ends, if it is not prolonged; `-`: until its session ends
"""


@leases.command("ls", epilog=COLUMNS)
@click.option("--kind", type=click.Choice([kind.value for kind in LeaseKind]), help="Only these.")
@click.option("--client", default="", help="Only those of this client, by its whole name.")
@limit_option("Leases")
@node_option
@with_settings
def list_leases(
    settings: KvctlSettings, kind: str | None, client: str, limit: int, nodes: tuple[str, ...]
) -> None:
    """Leases of readers and writers, by id."""
    wished = LeaseKind(kind) if kind else None
    answers = ask_nodes(
        settings, nodes, lambda node: node.list_leases(limit=limit, kind=wished, client=client)
    )
    if settings.json:
        print_document(listed_document("leases", answers))
    else:
        _print_leases(answers)
    end_by(answers)


def _print_leases(answers: list[NodeAnswer[tuple[list[LeaseInfo], bool]]]) -> None:
    listed = _lease_table("leases")
    for answer in answers:
        for lease in answer.answer[0] if answer.answer else ():
            _add_lease(listed, answer.node, lease)
    print_table(listed)
    say_more(answers, filters="--kind, --client")


def _lease_table(title: str) -> Table:
    return table(
        "node", "#lease", "kind", "state", "client", "#blocks", "#bytes", "#age", "#left",
        title=title,
    )  # fmt: skip


def _add_lease(listed: Table, node: str, lease: LeaseInfo) -> None:
    listed.add_row(
        node,
        str(lease.id),
        lease.kind.value,
        lease.state.value,
        lease.client,
        f"{lease.num_blocks:,}",
        nbytes_text(lease.nbytes),
        duration_text(lease.age_s),
        duration_text(lease.seconds_left) if lease.seconds_left else "-",
    )


@leases.command("revoke")
@click.argument("lease_id", type=click.IntRange(min=1, max=(1 << 64) - 1))
@node_option
@with_settings
def revoke_lease(settings: KvctlSettings, lease_id: int, nodes: tuple[str, ...]) -> None:
    """Ends lease LEASE_ID of one node as if its time had run out.

    A reader keeps its grace: bytes that it is copying stay for that long. A writer's room goes into quarantine, and
    comes back when it gives it up or its session ends. Ids are a node's own: where there are several nodes, say which
    with --node. The node logs who asked. Columns as `kvctl leases ls` says.
    """
    answers = ask_nodes(settings, nodes, lambda node: node.revoke_lease(lease_id), only_one=True)
    if settings.json:
        print_document([{"node": a.node, "lease": a.answer} for a in answers if a.answer])
    else:
        revoked = _lease_table("revoked")
        for answer in answers:
            if answer.answer:
                _add_lease(revoked, answer.node, answer.answer)
        if revoked.row_count:
            print_table(revoked)
    end_by(answers)

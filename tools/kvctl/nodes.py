"""`kvctl nodes`: the store nodes and their pools."""

from __future__ import annotations

import click

from snowskin.tools.kvctl.admin import AdminClient, NodeStatus
from snowskin.tools.kvctl.output import (
    KvctlSettings,
    age_text,
    ask,
    nbytes_text,
    print_json,
    print_table,
    table,
    with_settings,
)


@click.command()
@with_settings
def nodes(settings: KvctlSettings) -> None:
    """Store nodes: blocks, leases and the bytes of each pool.

    Asked now, through the conductor; a node that does not answer is listed with the reason. `known` are the blocks that
    the conductor's directory has of the node without asking; it places by them while the node is `in sync` with it, and
    `heard` says when the node told of its blocks last.
    """
    answer = ask(settings, AdminClient.nodes)
    if settings.json:
        print_json(answer)
    else:
        _print(answer)


def _print(answer: tuple[NodeStatus, ...]) -> None:
    listed = table(
        "node", "address", "state", "#blocks", "#known", "directory", "#heard", "#sessions",
        "#read leases", "#write leases", "#waiting matches", "#waiting reserves", title="nodes",
    )  # fmt: skip
    pools = table(
        "node", "pool", "tenant", "#capacity", "#free", "#committed", "#reserved", "#quarantined",
        "#leased", "#largest hole", title="pools",
    )  # fmt: skip
    for node in answer:
        stat, about = node.stat, node.knowledge
        known = ("-", "-", "-")
        if about is not None:
            known = (f"{about.num_blocks:,}", about.state, age_text(about.seconds_since_message))
        if stat is None:
            listed.add_row("?", node.address, node.error or "no answer", "", *known)
            continue
        listed.add_row(
            stat.node_id,
            node.address,
            "draining" if stat.draining else "serving",
            f"{stat.num_blocks:,}",
            *known,
            str(stat.num_sessions),
            str(stat.num_read_leases),
            str(stat.num_write_leases),
            str(stat.num_waiting_matches),
            str(stat.num_waiting_reserves),
        )
        for pool in stat.pools:
            pools.add_row(
                stat.node_id,
                f"{pool.tier} {pool.pool_id}",
                pool.tenant,
                nbytes_text(pool.capacity_nbytes),
                nbytes_text(pool.free_nbytes),
                nbytes_text(pool.committed_nbytes),
                nbytes_text(pool.reserved_nbytes),
                nbytes_text(pool.quarantined_nbytes),
                nbytes_text(pool.leased_nbytes),
                nbytes_text(pool.largest_hole_nbytes),
            )
    print_table(listed, pools)

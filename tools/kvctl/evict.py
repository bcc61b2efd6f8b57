"""`kvctl evict`: takes blocks out of the nodes, after it has shown what that would mean."""

from __future__ import annotations

import click

from snowskin.tools.kvctl.node_choice import KEY, NAMESPACE, ask_nodes, end_by, node_option
from snowskin.tools.kvctl.output import (
    KvctlSettings,
    nbytes_text,
    print_document,
    print_table,
    table,
    with_settings,
)

COLUMNS = """
\b
Columns:
  node     where
  blocks   that go
  bytes    that come free
  held     stay: somebody reads them, a writer builds on them, or their one reader is to come
  unknown  keys that are not here
"""


@click.command(epilog=COLUMNS)
@click.argument("keys", nargs=-1, type=KEY)
@click.option("--all", "every", is_flag=True, help="Every block, in place of keys.")
@click.option("--namespace", type=NAMESPACE, default=b"", help="Only this shard: 64 hex digits.")
@click.option("--yes", is_flag=True, help="Do it. Without, it is only shown what would go.")
@node_option
@with_settings
def evict(
    settings: KvctlSettings,
    keys: tuple[bytes, ...],
    every: bool,
    namespace: bytes,
    yes: bool,
    nodes: tuple[str, ...],
) -> None:
    """Takes blocks out of the nodes: those of KEYS (whole hashes in hex), or --all.

    Without --yes nothing goes, and the table shows what would. What is evicted is computed again by whoever needs it;
    what somebody holds stays. The node logs who asked.
    """
    if every is bool(keys):
        raise click.UsageError("give the keys of blocks, or --all")
    if len({len(key) for key in keys}) > 1:
        raise click.UsageError("keys of several lengths: evict those of one engine at a time")
    answers = ask_nodes(
        settings, nodes, lambda node: node.evict(keys, namespace=namespace, dry_run=not yes)
    )
    if settings.json:
        print_document(
            [
                {"node": a.node, "dry_run": not yes, "evicted": a.answer}
                for a in answers
                if a.answer is not None
            ]
        )
    else:
        title = "evicted" if yes else "would be evicted"
        shown = table("node", "#blocks", "#bytes", "#held", "#unknown", title=title)
        for answer in answers:
            if (one := answer.answer) is not None:
                shown.add_row(
                    answer.node,
                    f"{one.num_blocks:,}",
                    nbytes_text(one.nbytes),
                    f"{one.num_held:,}",
                    f"{one.num_unknown:,}",
                )
        print_table(shown)
        if not yes:
            print("nothing was evicted: add --yes to do it")
    end_by(answers)

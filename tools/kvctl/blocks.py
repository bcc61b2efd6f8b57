"""`kvctl blocks`: the blocks of the nodes, listed and shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from snowskin.tools.kvctl.node_choice import (
    KEY_PREFIX,
    NAMESPACE,
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
    from snowskin.kvstore.admin_messages import BlockInfo, ShownBlock
    from snowskin.tools.kvctl.node_admin import NodeAdminClient

# Of a namespace or a key, for people; `blocks show` takes so few too.
NUM_DIGITS = 16


@click.group()
def blocks() -> None:
    """The blocks of the nodes: list them, show one."""


COLUMNS = """
\b
Columns:
  node       where it is
  namespace  first digits of the layout's digest: same model, dtype, block size and shard
  key        first digits of the block's hash, which is chained: it names a whole prefix
  bytes      its size
  children   blocks here that continue it; a block with children is not evicted before them
  leases     readers of it, or of blocks placed with it; a leased block is not evicted
  age        since it was committed
  idle       since it, or a block placed with it, was matched last
  note       `one reader`: goes with its first reader
"""


@blocks.command("ls", epilog=COLUMNS)
@click.option("--namespace", type=NAMESPACE, default=b"", help="Only this shard: 64 hex digits.")
@click.option("--key-prefix", type=KEY_PREFIX, default=b"", help="Only keys that begin so, in hex.")
@click.option("--leased", is_flag=True, help="Only blocks that somebody reads now.")
@limit_option("Blocks")
@node_option
@with_settings
def list_blocks(
    settings: KvctlSettings,
    namespace: bytes,
    key_prefix: bytes,
    leased: bool,
    limit: int,
    nodes: tuple[str, ...],
) -> None:
    """Visible blocks, by namespace, then key. Pins nothing, and does not count as a use."""
    answers = ask_nodes(
        settings,
        nodes,
        lambda node: node.list_blocks(
            limit=limit, namespace=namespace, key_prefix=key_prefix, leased_only=leased
        ),
    )
    if settings.json:
        print_document(listed_document("blocks", answers))
    else:
        _print_blocks(answers)
    end_by(answers)


def _print_blocks(answers: list[NodeAnswer[tuple[list[BlockInfo], bool]]]) -> None:
    listed = table(
        "node", "namespace", "key", "#bytes", "#children", "#leases", "#age", "#idle", "note",
        title="blocks",
    )  # fmt: skip
    for answer in answers:
        for block in answer.answer[0] if answer.answer else ():
            listed.add_row(
                answer.node,
                block.namespace.hex()[:NUM_DIGITS],
                block.key.hex()[:NUM_DIGITS],
                nbytes_text(block.extent.nbytes),
                str(block.num_children),
                str(block.num_read_leases),
                duration_text(block.age_s),
                duration_text(block.idle_s),
                "one reader" if block.one_reader else "",
            )
    print_table(listed)
    say_more(answers, filters="--namespace, --key-prefix")


SHOWN = """
\b
What it says:
  extent      pool, first byte and size of its bytes; the generation rises with each reuse of that range
  parent      the block before it in the sequence
  checksum    CRC-32C of the bytes, tied to namespace and key
  other words as `kvctl blocks ls` and `kvctl leases ls` say
"""


@blocks.command("show", epilog=SHOWN)
@click.argument("key", type=KEY_PREFIX)
@click.option("--namespace", type=NAMESPACE, default=b"", help="Only this shard: 64 hex digits.")
@node_option
@with_settings
def show_block(
    settings: KvctlSettings, key: bytes, namespace: bytes, nodes: tuple[str, ...]
) -> None:
    """Everything about one block, with who reads it. KEY is its hash in hex, or as much of it as names one block.

    Exit status 1 where no node has it.
    """
    answers = ask_nodes(settings, nodes, lambda node: _shown(node, key, namespace))
    shown = [(a.node, one) for a in answers for one in a.answer or ()]
    if settings.json:
        print_document([{"node": node, "shown": one} for node, one in shown])
    else:
        for node, one in shown:
            _print_shown(node, one)
    end_by(answers)
    if not shown:
        click.echo(f"kvctl: no node that was asked has block {key.hex()}", err=True)
        raise click.exceptions.Exit(1)


async def _shown(node: NodeAdminClient, key: bytes, namespace: bytes) -> tuple[ShownBlock, ...]:
    # One that is short may be a prefix: whoever has it under a whole key says so.
    found, has_more = await node.list_blocks(limit=64, namespace=namespace, key_prefix=key)
    keys = {block.key for block in found}
    if key not in keys and (len(keys) > 1 or has_more):
        raise click.UsageError(
            f"{len(keys)} or more blocks of {node.address} begin with {key.hex()}: give more digits"
        )
    if not keys:
        return ()
    return await node.show_block(key if key in keys else keys.pop(), namespace=namespace)


def _print_shown(node: str, shown: ShownBlock) -> None:
    block = shown.block
    lines = {
        "node": node,
        "namespace": block.namespace.hex(),
        "key": block.key.hex(),
        "parent": block.parent_key.hex() or "none",
        "children": str(block.num_children),
        "extent": f"{block.extent.tier} pool {block.extent.pool_id}, {block.extent.nbytes:,} bytes at "
        f"{block.extent.offset:,}, generation {block.extent.generation}",
        "checksum": shown.checksum.hex(),
        "age, idle": f"{duration_text(block.age_s)}, {duration_text(block.idle_s)}",
        "note": "goes with its first reader" if block.one_reader else "stays until evicted",
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
    leases = table("#lease", "client", "state", "#age", "#left", title="read by")
    for lease in shown.leases:
        leases.add_row(
            str(lease.id), lease.client, lease.state.value, duration_text(lease.age_s),
            duration_text(lease.seconds_left),
        )  # fmt: skip
    print_table(leases)

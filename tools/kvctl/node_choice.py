"""Which nodes a command of kvctl asks, and how their answers come together.

Rules kept here: a node is named by its address, `host:port`, or by its id, which the conductor knows; without a name
all nodes that the conductor knows are asked, at once. A node that does not answer costs the others nothing: their
answers are shown, its trouble is a line on stderr, and the exit status is 1.
"""

from __future__ import annotations

import asyncio
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import click

from snowskin.kvstore.blocks import MAX_KEY_NBYTES, MIN_KEY_NBYTES
from snowskin.kvstore.errors import BadSetting
from snowskin.tools.kvctl.admin import AdminClient
from snowskin.tools.kvctl.node_admin import NodeAdminClient
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from snowskin.tools.kvctl.output import KvctlSettings

DEFAULT_LIMIT = 100
Answer = TypeVar("Answer")
Item = TypeVar("Item")
Command = TypeVar("Command", bound="Callable[..., object] | click.Command")
ADDRESS = re.compile(r".+:\d{1,5}")

node_option = click.option(
    "--node",
    "nodes",
    multiple=True,
    metavar="NODE",
    help="Ask this node: host:port, or an id that the conductor knows. Repeatable; without it, every node.",
)


def limit_option(what: str) -> Callable[[Command], Command]:
    """`--limit`, of a command that lists so many `what` of each node."""
    return click.option(
        "--limit",
        type=click.IntRange(min=1),
        default=DEFAULT_LIMIT,
        show_default=True,
        help=f"{what} of each node at most.",
    )


class HexBytes(click.ParamType[bytes]):
    """Bytes as hex digits."""

    name = "hex"

    def __init__(self, what: str, *, min_nbytes: int, max_nbytes: int) -> None:
        """Accepts so many bytes of a `what`."""
        self._what = what
        self._min_nbytes = min_nbytes
        self._max_nbytes = max_nbytes

    def convert(
        self, value: str | bytes, param: click.Parameter | None, ctx: click.Context | None
    ) -> bytes:
        """The bytes; a usage error where the text is none."""
        if isinstance(value, bytes):
            return value
        try:
            found = bytes.fromhex(value)
        except ValueError:
            self.fail(f"{value!r} is no even number of hex digits", param, ctx)
        if not self._min_nbytes <= len(found) <= self._max_nbytes:
            self.fail(
                f"a {self._what} has {2 * self._min_nbytes} to {2 * self._max_nbytes} hex digits, "
                f"not {2 * len(found)}",
                param,
                ctx,
            )
        return found


KEY = HexBytes("block key", min_nbytes=MIN_KEY_NBYTES, max_nbytes=MAX_KEY_NBYTES)
KEY_PREFIX = HexBytes("key prefix", min_nbytes=1, max_nbytes=MAX_KEY_NBYTES)
NAMESPACE = HexBytes("namespace", min_nbytes=32, max_nbytes=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAnswer(Generic[Answer]):
    """What one node said; `answer` is None where it failed, and `error` says how."""

    node: str
    answer: Answer | None = None
    error: SnowskinError | None = None


async def addresses_of(settings: KvctlSettings, names: Sequence[str]) -> list[str]:
    """Addresses of the nodes named, or of all; the conductor is asked only where it must be.

    Raises:
        BadSetting: no such node, or none at all.
        SnowskinError: the conductor does not answer.
    """
    if names and all(ADDRESS.fullmatch(name) for name in names):
        return list(dict.fromkeys(names))
    async with AdminClient(settings.conductor, timeout_s=settings.timeout_s) as admin:
        known = await admin.nodes()
    if not names:
        if not known:
            raise BadSetting(
                f"the conductor {settings.conductor} knows no node",
                hint="name one with --node host:port, or start an instance that has one",
            )
        return [node.address for node in known]
    by_id = {node.stat.node_id: node.address for node in known if node.stat is not None}
    unknown = [name for name in names if name not in by_id and not ADDRESS.fullmatch(name)]
    if unknown:
        raise BadSetting(
            f"the conductor {settings.conductor} knows no node {unknown[0]!r} that answers",
            hint=f"known are {', '.join(sorted(by_id)) or 'none'}; or name it by host:port",
        )
    return list(dict.fromkeys(by_id.get(name, name) for name in names))


async def _one(
    settings: KvctlSettings,
    address: str,
    question: Callable[[NodeAdminClient], Awaitable[Answer]],
) -> NodeAnswer[Answer]:
    try:
        async with NodeAdminClient(address, timeout_s=settings.timeout_s) as node:
            return NodeAnswer(node=address, answer=await question(node))
    except SnowskinError as error:
        return NodeAnswer(node=address, error=error)


def ask_nodes(
    settings: KvctlSettings,
    names: Sequence[str],
    question: Callable[[NodeAdminClient], Awaitable[Answer]],
    *,
    only_one: bool = False,
) -> list[NodeAnswer[Answer]]:
    """Asks the nodes at once; ends the command with exit status 1 where it is not known whom to ask.

    Args:
        settings: the conductor, and how long each may take.
        names: of nodes; none means all.
        question: asked of each.
        only_one: a usage error where there are several to ask.
    """

    async def call() -> list[NodeAnswer[Answer]]:
        addresses = await addresses_of(settings, names)
        if only_one and len(addresses) > 1:
            raise click.UsageError(
                f"there are {len(addresses)} nodes: say which with --node "
                f"({', '.join(addresses[:8])})"
            )
        return await asyncio.gather(*(_one(settings, address, question) for address in addresses))

    try:
        return asyncio.run(call())
    except SnowskinError as error:
        print(f"kvctl: {error}", file=sys.stderr)
        raise click.exceptions.Exit(1) from error


def end_by(answers: Sequence[NodeAnswer[Answer]]) -> None:
    """A line of trouble for each node that failed; then exit status 1."""
    failed = [answer for answer in answers if answer.error is not None]
    for answer in failed:
        print(f"kvctl: {answer.node}: {answer.error}", file=sys.stderr)
    if failed:
        raise click.exceptions.Exit(1)


def listed_document(
    name: str, answers: Sequence[NodeAnswer[tuple[list[Item], bool]]]
) -> list[dict[str, object]]:
    """What nodes listed, as one document: a list called `name` for each, and whether there is more."""
    return [
        {"node": a.node, name: a.answer[0], "more": a.answer[1]}
        for a in answers
        if a.answer is not None
    ]


def say_more(answers: Sequence[NodeAnswer[tuple[list[Item], bool]]], *, filters: str) -> None:
    """A line for each node that has more than it listed."""
    for answer in answers:
        if answer.answer and answer.answer[1]:
            print(f"{answer.node} has more: raise --limit, or narrow by {filters}")

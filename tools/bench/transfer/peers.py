"""Other systems beside ours: where they are found, and how they are run.

They are no dependencies: `make bench-peers` puts them into an environment of their own, whose packages the ends of
their pairs see behind ours. Which of them took part, and which did not and why, is said with every result.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from snowskin.tools.bench.transfer.namespace import namespaces_work
from snowskin.tools.bench.transfer.pair import Contestant
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ASK_TIMEOUT_S = 30.0
# Kernels that pace by default (bbr) cost every system half its rate on loopback; ours asks for another one per socket,
# so theirs get it as the default of their network.
UNPACED = "reno"
_UCX_ON_LOOPBACK = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "error"}
_UCX_TUNED = _UCX_ON_LOOPBACK | {
    "UCX_TCP_RX_SEG_SIZE": "1m",
    "UCX_TCP_TX_SEG_SIZE": "64k",
}

NIXL = Contestant(
    name="nixl as shipped",
    backend="nixl",
    pair="nixl as shipped",
    environment=_UCX_ON_LOOPBACK,
    is_peer=True,
    own_network=True,
    congestion=UNPACED,
)
NIXL_TUNED = Contestant(
    name="nixl tuned",
    backend="nixl",
    pair="nixl tuned",
    environment=_UCX_TUNED,
    is_peer=True,
    own_network=True,
    congestion=UNPACED,
)
UCX_GETS = Contestant(
    name="ucx gets tuned",
    backend="ucx_gets",
    pair="ucx gets tuned",
    is_peer=True,
    own_network=True,
    congestion=UNPACED,
)
MOONCAKE = Contestant(
    name="mooncake engine",
    backend="mooncake",
    pair="mooncake engine",
    is_peer=True,
    own_network=True,
    congestion=UNPACED,
)
PEERS = (NIXL, NIXL_TUNED, UCX_GETS, MOONCAKE)


class PeersUnusable(SnowskinError):
    """The environment of the peers cannot be used from this one."""

    status = "FAILED_PRECONDITION"


def package_folders(python: Path | None) -> tuple[str, ...]:
    """The folders with that environment's packages; none without one.

    Raises:
        PeersUnusable: it does not answer, or its Python is of another version: compiled packages would not load.
    """
    if python is None:
        return ()
    question = (
        "import json, sys, sysconfig;"
        "print(json.dumps([sys.version_info[:2], sysconfig.get_paths()['platlib']]))"
    )
    try:
        answer = subprocess.run(
            [str(python), "-I", "-c", question],
            capture_output=True,
            timeout=ASK_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PeersUnusable(
            f"{python} does not answer: {error}", hint="make bench-peers"
        ) from error
    version, folder = json.loads(answer.stdout)
    if tuple(version) != sys.version_info[:2]:
        ours = ".".join(map(str, sys.version_info[:2]))
        raise PeersUnusable(
            f"{python} is Python {'.'.join(map(str, version))}, this is {ours}",
            hint="make bench-peers with the Python of this environment",
        )
    return (folder,)


def runnable() -> tuple[tuple[Contestant, ...], dict[str, str]]:
    """The peers to try, and why those that are not tried are not."""
    if namespaces_work():
        return PEERS, {}
    why = "needs a network namespace of its own (root): it listens on all interfaces"
    return (), dict.fromkeys((peer.name for peer in PEERS), why)


def told(missing: dict[str, str]) -> Sequence[str]:
    """What is said of the peers that did not take part."""
    return [f"MISSING: {name}: {why}" for name, why in missing.items()]

"""A pull of more than one lease may cover: piece by piece.

Rules kept here: a node leases a client so much at once and no more; what it withheld is asked for when what it gave has
been read and released. What came before a piece failed is good, and stays. That others hold the leases is no failure:
the pull ends where they began.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from snowskin.kvstore.client import machine
from snowskin.kvstore.client.machine import AS_THE_CLIENT, FlowSettings, PullBounds, Pulled
from snowskin.kvstore.errors import LeaseShareExceeded
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.kvstore.blocks import KeyColumn
    from snowskin.kvstore.client.machine import PullFlow
    from snowskin.transport.memory import MemoryRegion


def pull(
    settings: FlowSettings,
    *,
    namespace: bytes,
    keys: KeyColumn,
    block_nbytes: int,
    local: MemoryRegion,
    local_offsets: Sequence[int],
    wait_blocks: int,
    timeout_s: float,
    bounds: PullBounds = AS_THE_CLIENT,
) -> PullFlow:
    """The longest committed run, in as many pieces as the node makes of it; each as `machine.pull`."""
    pulled = yield from machine.pull(
        settings,
        namespace=namespace,
        keys=keys,
        block_nbytes=block_nbytes,
        local=local,
        local_offsets=local_offsets,
        wait_blocks=wait_blocks,
        timeout_s=timeout_s,
        bounds=bounds,
    )
    while pulled.num_blocks_withheld:
        try:
            piece = yield from machine.pull(
                settings,
                namespace=namespace,
                keys=keys[pulled.num_blocks :],
                block_nbytes=block_nbytes,
                local=local,
                local_offsets=local_offsets[pulled.num_blocks :],
                wait_blocks=0,
                timeout_s=0.0,
                bounds=replace(bounds, on_found=None),
            )
        except LeaseShareExceeded:
            break
        except SnowskinError as error:
            return replace(pulled, broken_by=error)
        pulled = _joined(pulled, piece)
    return pulled


def _joined(pulled: Pulled, piece: Pulled) -> Pulled:
    """Two pieces as one; the second begins where the first ended."""
    return replace(
        pulled,
        num_blocks=pulled.num_blocks + piece.num_blocks,
        nbytes=pulled.nbytes + piece.nbytes,
        num_extents=pulled.num_extents + piece.num_extents,
        corrupt_blocks=tuple(pulled.num_blocks + index for index in piece.corrupt_blocks),
        seconds=pulled.seconds + piece.seconds,
        broken_by=piece.broken_by,
        num_blocks_withheld=piece.num_blocks_withheld,
    )

"""What a node's data plane at full rate does to its own control calls: a probe, over gRPC, as a conductor asks it.

Node, client at full rate and caller are a process each; idle and load alternate within a round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from snowskin.kvstore.client.blocking import BlockingStoreClient
from snowskin.tools.bench.store_process import store_process
from snowskin.tools.bench.transfer.control import (
    LISTEN_S,
    SETTLE_S,
    SMOKE_LISTEN_S,
    calls_us,
    ratio_rows,
)
from snowskin.tools.bench.transfer.node_load import NAMESPACE, keys_of
from snowskin.tools.bench.transfer.pair import PairFailed
from snowskin.tools.bench.transfer.shape import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.tools.bench.report import Row

NUM_BLOCKS, BLOCK_NBYTES = 64, 256 * KIB
DRAM_NBYTES = 256 * MIB
END_TIMEOUT_S = 10.0


@contextmanager
def _load_process(address: str) -> Iterator[subprocess.Popen[str]]:
    """A client of its own process that waits to be told to pull; gone with the block."""
    module = "snowskin.tools.bench.transfer.node_load"
    command = [sys.executable, "-P", "-m", module, address, str(NUM_BLOCKS), str(BLOCK_NBYTES)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None, "it was asked for"
    assert process.stdout is not None, "it was asked for"
    try:
        yield process
    finally:
        process.stdin.close()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _begin(process: subprocess.Popen[str], for_s: float) -> None:
    assert process.stdin is not None, "it was asked for"
    process.stdin.write(f"{for_s}\n")
    process.stdin.flush()


def _rate(process: subprocess.Popen[str]) -> float:
    """GB/s of the load that was begun, once it has ended."""
    assert process.stdout is not None, "it was asked for"
    line = process.stdout.readline()
    if not line:
        raise PairFailed(f"the client at full rate died, status {process.wait(END_TIMEOUT_S)}")
    done = json.loads(line)
    return float(done["num_pulls"] * NUM_BLOCKS * BLOCK_NBYTES / done["seconds"] / 1e9)


def node_rows(*, rounds: int, smoke: bool) -> list[Row]:
    """Percentiles of a probe at a node under load, against idle."""
    listen_s = SMOKE_LISTEN_S if smoke else LISTEN_S
    keys = keys_of(NUM_BLOCKS)
    idle, loaded, rates = [], [], []
    with (
        store_process(dram_nbytes=DRAM_NBYTES) as store,
        BlockingStoreClient.connect(store.door, client_name="bench-door") as door,
        BlockingStoreClient.connect(store.address, client_name="bench-control") as caller,
        _load_process(store.address) as load,
    ):
        source = np.arange(NUM_BLOCKS * BLOCK_NBYTES // 8, dtype=np.uint64).view(np.uint8)
        with door.register(source) as local:
            door.publish(
                namespace=NAMESPACE,
                keys=keys,
                block_nbytes=BLOCK_NBYTES,
                local=local,
                local_offsets=range(0, source.nbytes, BLOCK_NBYTES),
            )

        def probe() -> None:
            caller.probe(namespaces=[NAMESPACE], keys=keys)

        _begin(load, 0.01)  # connects
        _rate(load)
        for _ in range(rounds):
            idle.append(calls_us(probe, listen_s))
            _begin(load, listen_s + 2 * SETTLE_S)
            time.sleep(SETTLE_S)
            loaded.append(calls_us(probe, listen_s))
            rates.append(_rate(load))
    return ratio_rows("probe of a node", "its data plane", idle, loaded, rates, is_judged=True)

"""A client that pulls from a node over its data plane as fast as it can, in a process of its own, when it is told to.

Started as `python -m snowskin.tools.bench.transfer.node_load ADDRESS NUM_BLOCKS BLOCK_NBYTES`. Each line of its input
is a number of seconds to pull for; it answers with the number of pulls and the seconds (JSON), and ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client.blocking import BlockingStoreClient
from snowskin.kvstore.client.transports import ClientTransports

NAMESPACE = b"transfer-bench".ljust(32, b"\0")


def keys_of(num_blocks: int) -> KeyColumn:
    """The keys of all blocks, the same in every process."""
    packed = b"".join(index.to_bytes(32, "little") for index in range(1, num_blocks + 1))
    return KeyColumn(packed=packed, width=32)


def main(address: str, num_blocks: int, block_nbytes: int) -> None:
    """Pulls on demand until the input ends."""
    os.nice(19)  # it stands for another host, whose cores these two are not
    keys, target = keys_of(num_blocks), np.zeros(num_blocks * block_nbytes, np.uint8)
    transports = ClientTransports("tcp")  # demanded: the slow path would be another question
    with (
        BlockingStoreClient.connect(
            address, client_name="bench-load", transports=transports
        ) as client,
        client.register(target) as local,
    ):
        for line in sys.stdin:
            num_pulls, began_s = 0, time.perf_counter()
            until_s = began_s + float(line)
            while time.perf_counter() < until_s:
                pulled = client.pull(
                    namespace=NAMESPACE,
                    keys=keys,
                    block_nbytes=block_nbytes,
                    local=local,
                    local_offsets=range(0, target.nbytes, block_nbytes),
                )
                assert pulled.num_blocks == num_blocks, "a benchmark's blocks were evicted"
                num_pulls += 1
            seconds = time.perf_counter() - began_s
            sys.stdout.write(json.dumps({"num_pulls": num_pulls, "seconds": seconds}) + "\n")
            sys.stdout.flush()
    transports.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

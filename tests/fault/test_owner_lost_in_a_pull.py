"""The node dies, or stops, while another host pulls from its data plane: what came is good, the rest is computed."""

from __future__ import annotations

import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from snowskin.engines.model.sampler import SamplingParams
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.client.transports import ClientTransports
from snowskin.kvstore.errors import DeadlineExceeded, NodeUnavailable
from tests.support.engine_bench import make_limits, open_bench, prompt_tokens, straight
from tests.support.node_process import NodeProcess
from tests.support.store_drivers import DRIVERS, connected, keys_of, namespace_of, noise

BLOCK_NBYTES = 1 << 20
NUM_BLOCKS = 96  # more than is on the way by the time a signal has struck
MOVE_TIMEOUT_S = 0.3
NOTICED_S = 1.0  # a killed owner
BUSY_S = 2.0  # what a busy machine may add
GREEDY = SamplingParams(max_tokens=8)
STRIKES = {signal.SIGKILL: NodeUnavailable, signal.SIGSTOP: DeadlineExceeded}

pytestmark = pytest.mark.parametrize("strike", STRIKES, ids=lambda strike: strike.name)


def make_node(**settings):
    return NodeProcess({"dram_nbytes": 512 << 20, "log_level": "error", **settings})


def strike_at_the_first_piece(client, node, strike, struck):
    """Has the node struck when the first piece of a pull of this client has landed; once."""
    moves = client._connection._moves

    def with_strike(step):
        def landed(offset, nbytes):
            if not struck:
                struck.append(time.monotonic())
                node.signal(strike)
            step.landed(offset, nbytes)

        return step if step.is_push else replace(step, landed=landed)

    for name in ("move", "move_blocking"):
        move = getattr(moves, name)
        setattr(moves, name, lambda step, move=move: move(with_strike(step)))


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_landed_before_is_good_and_the_rest_is_an_error_in_time(driver, strike):
    data = noise(1, NUM_BLOCKS * BLOCK_NBYTES)
    there = {"namespace": namespace_of(1), "keys": keys_of(1, NUM_BLOCKS), "block_nbytes": BLOCK_NBYTES}  # fmt: skip
    where = range(0, data.nbytes, BLOCK_NBYTES)
    transports = ClientTransports("tcp")
    struck: list[float] = []
    with (
        make_node() as node,
        connected(
            driver, node.address, transports=transports, move_timeout_s=MOVE_TIMEOUT_S,
            call_timeout_s=0.3,
        ) as client,
    ):  # fmt: skip
        client.publish(**there, local=client.register(data), local_offsets=where)
        landing = np.zeros_like(data)
        strike_at_the_first_piece(client, node, strike, struck)
        pulled = client.pull(**there, local=client.register(landing), local_offsets=where)
        took_s = time.monotonic() - struck[0]
        as_returned = landing.copy()
        good_nbytes = pulled.num_blocks * BLOCK_NBYTES
        assert 0 < pulled.num_blocks < NUM_BLOCKS
        assert isinstance(pulled.broken_by, STRIKES[strike]), pulled.broken_by
        assert (landing[:good_nbytes] == data[:good_nbytes]).all()
        if strike is signal.SIGKILL:
            assert took_s < NOTICED_S + BUSY_S
        else:
            assert MOVE_TIMEOUT_S * 0.9 < took_s < MOVE_TIMEOUT_S + BUSY_S
            node.signal(signal.SIGCONT)
            again = client.pull(**there, local=client.register(np.zeros_like(data)), local_offsets=where)  # fmt: skip
            assert again.num_blocks == NUM_BLOCKS
            assert (landing == as_returned).all(), "bytes landed after the pull had returned"
    transports.close()


async def test_an_engine_computes_what_the_lost_node_did_not_bring(strike):
    transports = ClientTransports("tcp")
    struck: list[float] = []
    clients = []
    prompt = prompt_tokens(130, seed=3)
    limits = make_limits(pull_timeout_s=MOVE_TIMEOUT_S)
    with make_node() as node:

        async def connect():
            client = await StoreClient.connect(
                node.address, client_name="engine", transports=transports
            )
            clients.append(client)
            return client

        async with open_bench(connect, limits=limits) as bench:
            first, _, answer = await bench.run(prompt, GREEDY, request_id="first")
            assert answer.stats.num_blocks_pulled > 0
            for client in clients:
                strike_at_the_first_piece(client, node, strike, struck)
            began_at_s = time.monotonic()
            second, _, _ = await bench.run(prompt, GREEDY, request_id="second")
            took_s = time.monotonic() - began_at_s
            assert struck
            assert first == second == straight(prompt, GREEDY)
            assert took_s < 4 * MOVE_TIMEOUT_S + BUSY_S
            assert bench.all_free()
    transports.close()

"""Client flows driven by hand against a node's state, with faults at any step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from snowskin.kvstore.client import machine, pieces
from snowskin.kvstore.client.machine import Call, Done, FlowSettings, Move, Tell
from snowskin.kvstore.errors import NodeUnavailable
from snowskin.transport.memory import region_of
from tests.support.node_driver import BLOCK, NAMESPACE, NodeDriver, column

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

NUM_BLOCKS = 8
SETTINGS = FlowSettings(
    verify=True, call_timeout_s=2.0, move_timeout_s=3.0, read_ttl_s=10.0, write_ttl_s=30.0
)


class Stage:
    """A node, its memory, a client's memory, and a driver that fails where it is told to."""

    def __init__(self, **limits: Any) -> None:
        self.node = NodeDriver(blocks=NUM_BLOCKS, max_extent_nbytes=2 * BLOCK, **limits)
        self.session = self.node.session("client")
        self.pool = np.zeros(NUM_BLOCKS * BLOCK, np.uint8)
        self.memory = np.random.default_rng(0).integers(0, 256, NUM_BLOCKS * BLOCK, np.uint8)
        self.local = region_of(self.memory)
        self.landing = np.zeros(NUM_BLOCKS * BLOCK, np.uint8)
        self.land_in = region_of(self.landing)
        self.steps: list[machine.Step] = []
        self.fail_at: int | None = None
        self.fail_with: BaseException = NodeUnavailable("cut")
        self.is_carried_out_first = False
        self.cut_after_pieces: int | None = None
        self.before_move: Callable[[], None] = lambda: None

    def run(self, flow: Generator[Any, Done, Any]) -> Any:
        """Drives a flow to its end; its result."""
        self.steps = []
        step = next(flow)
        try:
            while True:
                position = len(self.steps)
                self.steps.append(step)
                began_at_s = self.node.now_s
                try:
                    if position == self.fail_at and not self.is_carried_out_first:
                        raise self.fail_with
                    reply = self.carry_out(step)
                    if position == self.fail_at:
                        raise self.fail_with
                except BaseException as error:  # noqa: BLE001  the flow gives its lease back, and raises it again
                    step = flow.throw(error)
                else:
                    step = flow.send(Done(reply, began_at_s, self.node.now_s))
        except StopIteration as end:
            return end.value

    def carry_out(self, step: machine.Step) -> Any:
        match step:
            case Call(request=request):
                return self.node.ask(self.session, request, object)
            case Tell(request=request):
                self.node.call(self.session, request)
            case Move():
                self.before_move()
                self.copy(step)
        return None

    def copy(self, step: Move) -> None:
        num_pieces = 0
        for pool_id, runs in step.runs:
            assert pool_id == 0
            for remote, local, nbytes in runs:
                for start, length in ((0, nbytes // 2), (nbytes // 2, nbytes - nbytes // 2)):
                    if num_pieces == self.cut_after_pieces:
                        raise self.fail_with
                    num_pieces += 1
                    here = step.local.buffer[local + start : local + start + length]
                    there = self.pool[remote + start : remote + start + length]
                    if step.is_push:
                        there[:] = here
                    else:
                        here[:] = there
                    if step.landed is not None:
                        step.landed(local + start, length)

    def publish(self, names: str, **changes: Any) -> Any:
        first = changes.pop("first", 0)
        keys = column(names)
        wanted = {
            "namespace": NAMESPACE,
            "keys": keys,
            "parent_key": b"",
            "block_nbytes": BLOCK,
            "local": self.local,
            "local_offsets": range(first * BLOCK, (first + len(keys)) * BLOCK, BLOCK),
            "one_reader": False,
            "timeout_s": 0.0,
        }
        return machine.publish(SETTINGS, **{**wanted, **changes})

    def pull(self, names: str, settings: FlowSettings = SETTINGS, **changes: Any) -> Any:
        keys = column(names)
        wanted = {
            "namespace": NAMESPACE,
            "keys": keys,
            "block_nbytes": BLOCK,
            "local": self.land_in,
            "local_offsets": range(0, len(keys) * BLOCK, BLOCK),
            "wait_blocks": 0,
            "timeout_s": 0.0,
        }
        return pieces.pull(settings, **{**wanted, **changes})

    def publish_tail(self, tail_id: str = "r1") -> Any:
        return machine.publish_tail(
            SETTINGS,
            namespace=NAMESPACE,
            tail_id=tail_id,
            local=self.local,
            local_offset=BLOCK,
            nbytes=BLOCK,
            timeout_s=0.0,
        )

    def pull_tail(self, tail_id: str = "r1", settings: FlowSettings = SETTINGS) -> Any:
        return machine.pull_tail(
            settings,
            namespace=NAMESPACE,
            tail_id=tail_id,
            nbytes=BLOCK,
            local=self.land_in,
            local_offset=2 * BLOCK,
            timeout_s=0.0,
        )

    def kinds(self) -> list[str]:
        """The steps that were done, by what they said."""
        return [
            "Move"
            if isinstance(step, Move)
            else type(step.request).__name__.removesuffix("Request")
            for step in self.steps
        ]

    def assert_nothing_is_held(self) -> None:
        stat = self.node.state.stat()
        assert (stat.num_read_leases, stat.num_write_leases) == (0, 0)
        assert (stat.pools[0].reserved_nbytes, stat.pools[0].leased_nbytes) == (0, 0)

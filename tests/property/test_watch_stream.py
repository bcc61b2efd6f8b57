"""Whoever takes a node's stream in, in its order, has just the node's blocks whenever it is told that it is in sync.

A machine of writers, readers who complain and a pool that is too small around a node's state; its subscribers are plain
sets. Nothing is asked of a subscriber that is not in sync.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.errors import PoolExhausted, WatcherTooSlow
from snowskin.kvstore.messages import BlockChange, Reserved, WatchRequest
from snowskin.kvstore.node.events import BlockEvents, Subscription
from snowskin.transport.errors import SnowskinError
from tests.support.node_driver import (
    NAMESPACE,
    OTHER_NAMESPACE,
    NodeDriver,
    lease_of,
    reserving,
    reserving_tail,
)

if TYPE_CHECKING:
    from snowskin.kvstore.messages import Watched
    from snowskin.kvstore.node.state import NodeState

Name = tuple[bytes, bytes]
NUM_BLOCKS = 16
RING_NBYTES = 4096  # some 25 changes of one key
WORD = 2**64


def number_of(name: bytes) -> int:
    """The first eight bytes, little-endian; written anew, as another client would."""
    return sum(byte << (8 * place) for place, byte in enumerate(name[:8]))


def digest_of(names: set[Name]) -> int:
    digest = 0
    for namespace, key in names:
        digest ^= (number_of(namespace) + number_of(key)) % WORD
    return digest


def visible(state: NodeState) -> set[Name]:
    index = state.residence.index
    return {
        (namespace, key)
        for namespace in index.namespaces("default")
        for key, entry in index.scope("default", namespace).blocks.items()
        if not entry.one_reader
    }


@dataclass
class Subscriber:
    """One that does as the wire says, and what it knows."""

    state: NodeState
    budget_nbytes: int
    names: set[Name] = field(default_factory=set)
    epoch: int = 0
    sequence: int = 0
    is_complete: bool = False
    num_syncs: int = 0
    subscription: Subscription | None = None

    def connect(self) -> None:
        request = WatchRequest(node_epoch=self.epoch, sequence=self.sequence)
        if not self.is_complete:
            request = WatchRequest()
        self.subscription = self.state.watch(request, budget_nbytes=self.budget_nbytes)

    def take(self, message: Watched) -> None:
        if message.snapshot_begins:
            self.names.clear()
            self.is_complete = False
        for change in message.changes:
            names = {(change.namespace, key) for key in change.keys}
            assert len(names) == len(change.keys), "a key twice in one record"
            if change.removed:
                self.names -= names
            else:
                self.names |= names
        self.epoch, self.sequence = message.node_epoch, message.sequence
        if message.in_sync:
            self.is_complete = True
            self.num_syncs += 1
            assert self.names == visible(self.state), "in sync, and of another opinion"
            assert message.num_blocks == len(self.names)
            assert message.digest == digest_of(self.names)

    def hear(self) -> bool:
        """Whether anything was told; one that is too slow comes again."""
        try:
            messages = self.subscription.next_messages()
        except WatcherTooSlow:
            self.connect()
            messages = self.subscription.next_messages()
            assert messages[0].snapshot_begins, "what it lacked was forgotten"
        for message in messages:
            self.take(message)
        return bool(messages)


class WatchMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.node = NodeDriver(blocks=NUM_BLOCKS, watch_ring_nbytes=RING_NBYTES)
        self.session = self.node.session()
        self.subscribers: list[Subscriber] = []
        self.num_published = 0

    @precondition(lambda self: len(self.subscribers) < 3)
    @rule(budget_nbytes=st.sampled_from([1, 300, 700, 1 << 16]))
    def subscribe(self, budget_nbytes: int) -> None:
        self.subscribers.append(Subscriber(self.node.state, budget_nbytes))
        self.subscribers[-1].connect()

    @precondition(lambda self: self.subscribers)
    @rule(which=st.integers(0, 2))
    def reconnect(self, which: int) -> None:
        self.subscribers[which % len(self.subscribers)].connect()

    @precondition(lambda self: self.subscribers)
    @rule(which=st.integers(0, 2), times=st.integers(1, 3))
    def hear(self, which: int, times: int) -> None:
        for _ in range(times):
            self.subscribers[which % len(self.subscribers)].hear()

    @precondition(lambda self: self.subscribers)
    @rule(which=st.integers(0, 2))
    def beat(self, which: int) -> None:
        subscriber = self.subscribers[which % len(self.subscribers)]
        if not subscriber.hear():
            message = subscriber.subscription.beat()
            assert message.in_sync
            subscriber.take(message)

    @rule(
        namespace=st.sampled_from([NAMESPACE, OTHER_NAMESPACE]),
        first=st.integers(0, 30),
        num=st.integers(1, 6),
        one_reader=st.sampled_from([False, False, False, True]),
    )
    def publish(self, namespace: bytes, first: int, num: int, one_reader: bool) -> None:
        names = " ".join(f"a{i}" for i in range(first, first + num))
        request = reserving(names, namespace=namespace, one_reader=one_reader)
        self.finish(request)

    @rule(count=st.integers(1, 20))
    def churn(self, count: int) -> None:
        """New blocks one by one: a change each, and evictions when the pool is full."""
        for _ in range(count):
            self.num_published += 1
            self.finish(reserving(f"c{self.num_published}"))

    @rule()
    def publish_tail(self) -> None:
        self.num_published += 1
        self.finish(reserving_tail(f"r{self.num_published}"))

    def finish(self, request) -> None:
        answer = self.node.answer(self.session, self.node.call(self.session, request))
        if isinstance(answer, SnowskinError):
            assert isinstance(answer, PoolExhausted)
            return
        assert isinstance(answer, Reserved)
        if answer.lease is not None:
            num = sum(run.num_blocks for run in answer.runs)
            names = " ".join(["x"] * num)
            self.node.commit(self.session, lease_of(answer), names)

    @rule(first=st.integers(0, 30), complain=st.booleans())
    def read(self, first: int, complain: bool) -> None:
        names = " ".join(f"a{i}" for i in range(first, first + 3))
        matched = self.node.match(self.session, names)
        if matched.lease is not None:
            self.node.release(self.session, matched.lease.id, wrong=(0,) if complain else ())

    @rule()
    def wait(self) -> None:
        self.node.wait(50.0)

    def teardown(self) -> None:
        if not hasattr(self, "node"):
            return
        for subscriber in self.subscribers:
            before = subscriber.num_syncs
            for _ in range(200):
                if not subscriber.hear():
                    break
            else:
                raise AssertionError("a subscriber that reads on never knows all")
            subscriber.take(subscriber.subscription.beat())
            assert subscriber.num_syncs > before


WatchMachine.TestCase.settings = settings(stateful_step_count=40, max_examples=60, deadline=None)
TestWatchMachine = WatchMachine.TestCase


# --- the machine finds what it is for


def forget_evictions(patch: pytest.MonkeyPatch) -> None:
    note = BlockEvents.note

    def hears_no_removal(self, namespace, key, removed):
        if not removed:
            note(self, namespace, key, removed)

    patch.setattr(BlockEvents, "note", hears_no_removal)


def tell_of_blocks_for_one_reader(patch: pytest.MonkeyPatch) -> None:
    def careless(self, namespace, keys):
        blocks = self._index.scope(self._tenant, namespace).blocks
        column = KeyColumn.of([key for key in keys if key in blocks])
        yield BlockChange(namespace=namespace, keys=column)

    patch.setattr(Subscription, "_visible", careless)


def read_a_page_before_the_changes(patch: pytest.MonkeyPatch) -> None:
    """A snapshot that was read whole when the subscriber came."""
    read = Subscription._read_pages
    patch.setattr(Subscription, "_read_pages", lambda self: iter(list(read(self))))


def go_on_behind_what_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockEvents, "can_go_on_behind", lambda self, number: True)
    behind = BlockEvents.behind

    def lossy(self, number, budget_nbytes):
        return behind(self, max(number, self.first_number - 1), budget_nbytes)

    patch.setattr(BlockEvents, "behind", lossy)


PLANTED = [
    forget_evictions,
    tell_of_blocks_for_one_reader,
    read_a_page_before_the_changes,
    go_on_behind_what_is_forgotten,
]


@pytest.mark.parametrize("plant", PLANTED)
def test_the_machine_finds_a_planted_bug(plant, monkeypatch):
    plant(monkeypatch)
    quick = settings(
        stateful_step_count=40, max_examples=300, deadline=None, phases=[Phase.generate],
        derandomize=True, database=None,
    )  # fmt: skip
    with pytest.raises(Exception):  # noqa: B017, PT011  whichever it trips over first
        run_state_machine_as_test(WatchMachine, settings=quick)

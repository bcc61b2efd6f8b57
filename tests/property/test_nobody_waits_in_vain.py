"""After any events, with timers that come late, nobody waits on a node for what it could have at once."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from snowskin.kvstore.messages import (
    AbortRequest,
    CommitRequest,
    Lease,
    Matched,
    ReleaseRequest,
    Reserved,
)
from snowskin.transport.errors import SnowskinError
from tests.support.node_driver import NodeDriver, matching, reserving

if TYPE_CHECKING:
    from snowskin.kvstore.session import Session

NUM_SEEDS, NUM_STEPS, NUM_KEYS = 150, 120, 27
CAPS: list[dict[str, Any]] = [
    {},
    {},
    {"max_leased_ratio": 0.5, "max_client_leased_ratio": 0.25},
    {"max_quarantined_ratio": 0.25},
]


@dataclass
class Held:
    """A lease of a session, and for a writer's the blocks left to commit."""

    session: Session
    lease: Lease
    num_blocks: int = 0


@dataclass
class Crowd:
    """Four clients that do anything at all to one small node."""

    seed: int
    reads: list[Held] = field(default_factory=list)
    writes: list[Held] = field(default_factory=list)
    calls: list[tuple[Session, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = chance = random.Random(self.seed)
        self.node = NodeDriver(
            blocks=chance.choice([2, 4, 8, 12]),
            read_lease_s=chance.choice([2.0, 5.0]),
            write_lease_s=chance.choice([3.0, 60.0]),
            grace_s=chance.choice([0.0, 1.0, 5.0]),
            **chance.choice(CAPS),
        )
        self.sessions = [self.new_session(f"client {number}") for number in range(4)]

    def new_session(self, name: str) -> Session:
        return self.node.session(name, maps=self.chance.random() < 0.6)

    def keys(self) -> str:
        first = self.chance.randrange(NUM_KEYS)
        return " ".join(f"k{number}" for number in range(first, first + self.chance.randint(1, 3)))

    def reserve(self, session: Session) -> None:
        request = reserving(
            self.keys(),
            one_reader=self.chance.random() < 0.4,
            timeout_s=self.chance.choice([0.0, 0.0, 20.0, 60.0]),
        )
        self.calls.append((session, self.node.call(session, request)))

    def match(self, session: Session) -> None:
        request = matching(
            self.keys(),
            wait_blocks=self.chance.choice([0, 2]),
            timeout_s=self.chance.choice([0.0, 5.0]),
        )
        self.calls.append((session, self.node.call(session, request)))

    def finish_write(self, _session: Session) -> None:
        if self.writes:
            held = self.writes.pop(self.chance.randrange(len(self.writes)))
            lease_id, num_blocks = held.lease.id, held.num_blocks
            commit = CommitRequest(
                lease_id=lease_id, num_blocks=num_blocks, checksums=b"crc." * num_blocks
            )
            abort = AbortRequest(lease_id=lease_id)
            self.node.call(held.session, commit if self.chance.random() < 0.6 else abort)

    def finish_read(self, _session: Session) -> None:
        if self.reads:
            held = self.reads.pop(self.chance.randrange(len(self.reads)))
            self.node.call(held.session, ReleaseRequest(lease_ids=(held.lease.id,)))

    def leave(self, session: Session) -> None:
        self.node.end(session)
        self.sessions[self.sessions.index(session)] = self.new_session("again")
        self.writes = [held for held in self.writes if held.session is not session]
        self.reads = [held for held in self.reads if held.session is not session]
        self.calls = [call for call in self.calls if call[0] is not session]

    def cancel(self, _session: Session) -> None:
        if self.calls:
            self.node.cancel(*self.calls.pop(self.chance.randrange(len(self.calls))))

    def jump(self, _session: Session) -> None:
        """Time passes, and no timer has fired yet."""
        self.node.now_s += self.chance.choice([0.1, 0.5, 1.0, 2.0, 5.0, 9.0])

    def step(self) -> None:
        acts = [
            *(14 * [self.reserve]),
            *(6 * [self.match]),
            *(8 * [self.finish_write]),
            *(6 * [self.finish_read]),
            *(1 * [self.leave]),
            *(1 * [self.cancel]),
            *(4 * [self.jump]),
        ]
        with contextlib.suppress(SnowskinError):  # refused: what is asked is anything at all
            self.chance.choice(acts)(self.chance.choice(self.sessions))
        self.collect()

    def collect(self) -> None:
        waiting = []
        for session, call_id in self.calls:
            answer = self.node.answer(session, call_id)
            if answer is None:
                waiting.append((session, call_id))
            elif isinstance(answer, Reserved) and answer.lease:
                num_blocks = sum(run.num_blocks for run in answer.runs)
                self.writes.append(Held(session, answer.lease, num_blocks))
            elif isinstance(answer, Matched) and answer.lease:
                self.reads.append(Held(session, answer.lease))
        self.calls = waiting

    def served_when_all_are_tried(self) -> list[Any]:
        """What an honest look at every waiting call would do now, after timers that are due have fired."""
        self.node.take(self.node.state.on_time(self.node.now_s))
        self.collect()
        writing, reading = self.node.state._writing, self.node.state._reading
        for call in reading.waiting:
            session, request = reading._of(call)
            shards, found = reading._find(session, request)
            if found is None or len(shards[0]) >= request.wait_blocks:
                return [call]
        for call in writing.waiting:
            call.tried_at = -1
        return list(writing.serve_waiting(self.node.now_s))


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, 50))
def test_nobody_waits_for_what_could_be_had(first):
    num_waits = 0
    for seed in range(first, first + 50):
        crowd = Crowd(seed)
        for step in range(NUM_STEPS):
            crowd.step()
            if crowd.chance.random() < 0.7:
                assert crowd.served_when_all_are_tried() == [], f"seed {seed}, step {step}"
                due_s = crowd.node.state.next_time_s()
                assert due_s is None or due_s > crowd.node.now_s, f"seed {seed}, step {step}"
            num_waits += len(crowd.calls)
    assert num_waits > 1_000, "hardly anybody waited"

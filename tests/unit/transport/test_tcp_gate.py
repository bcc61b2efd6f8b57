"""Who may ask an owner next."""

from __future__ import annotations

from snowskin.transport.tcp.gate import Gate, Ticket


def waiting(gate: Gate, nbytes: int, urgency: int, entered: list[str], name: str) -> Ticket:
    return gate.wait(nbytes, urgency, lambda: entered.append(name))


def test_transfers_enter_while_there_is_room_for_all_their_bytes() -> None:
    gate = Gate(max_transfers=8, max_nbytes=100)
    assert gate.try_enter(60) == 60
    assert gate.try_enter(40) == 40
    assert gate.try_enter(1) == 0
    gate.leave(40)
    assert gate.try_enter(40) == 40
    assert (gate.num_inside, gate.nbytes_inside) == (2, 100)


def test_no_more_transfers_than_allowed_are_inside() -> None:
    gate = Gate(max_transfers=2, max_nbytes=100)
    assert gate.try_enter(1)
    assert gate.try_enter(1)
    assert not gate.try_enter(1)


def test_what_is_larger_than_the_budget_goes_alone() -> None:
    gate = Gate(max_transfers=8, max_nbytes=100)
    assert gate.try_enter(1000) == 100
    assert not gate.try_enter(1)
    gate.leave(100)
    assert gate.try_enter(1)
    assert not gate.try_enter(1000)


def test_the_lower_class_goes_first_and_within_it_who_came_first() -> None:
    gate = Gate(max_transfers=1, max_nbytes=100)
    assert gate.try_enter(1)
    entered: list[str] = []
    for name, urgency in (("replication", 2), ("prefetch", 1), ("first", 0), ("second", 0)):
        waiting(gate, 1, urgency, entered, name)
    assert not entered
    for _ in range(4):
        gate.leave(1)
    assert entered == ["first", "second", "prefetch", "replication"]


def test_nobody_overtakes_one_that_waits_though_it_would_fit() -> None:
    gate = Gate(max_transfers=8, max_nbytes=100)
    charge = gate.try_enter(60)
    entered: list[str] = []
    waiting(gate, 60, 0, entered, "large")
    assert not gate.try_enter(10)
    waiting(gate, 10, 0, entered, "small")
    assert not entered
    gate.leave(charge)
    assert entered == ["large", "small"]


def test_who_stops_waiting_leaves_nothing_behind() -> None:
    gate = Gate(max_transfers=8, max_nbytes=100)
    charge = gate.try_enter(60)
    entered: list[str] = []
    large = waiting(gate, 60, 0, entered, "large")
    waiting(gate, 10, 0, entered, "small")
    gate.give_up(large)
    assert entered == ["small"]
    assert (gate.num_waiting, gate.num_inside, gate.nbytes_inside) == (0, 2, 70)
    gate.leave(charge)
    assert (gate.num_inside, gate.nbytes_inside) == (1, 10)


def test_who_stops_waiting_when_it_was_let_in_already_leaves() -> None:
    gate = Gate(max_transfers=1, max_nbytes=100)
    entered: list[str] = []
    ticket = waiting(gate, 10, 0, entered, "late")
    assert entered == ["late"]
    gate.give_up(ticket)
    assert (gate.num_inside, gate.nbytes_inside) == (0, 0)

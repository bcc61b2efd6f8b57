"""What a call costs: a request's KV as one contiguous segment, and as scattered blocks of a layer-major layout.

FlowKV [2504.03775] says: contiguous KV needs a call or a few instead of thousands, and where calls dominate that saves
over 90 % of the time; P/D-Serve [2408.08147]: one send instead of paged sends takes 46 % less. Here the same bytes move
over the same transport: *paged, layer-major* is a call per layer, K or V, and block of 16 tokens, the blocks in random
order as after churn; *paged, block-major* a call per block; *segment* one call; *one batch* is the layer-major layout
again, all of its ranges in one pull of ours. What a call costs beside its bytes (a rendezvous, a kernel launch, a
doorbell) is emulated by waiting before each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from snowskin.tools.bench.report import Goal, Row, make_paired_row, make_row
from snowskin.tools.bench.transfer.pair import OTHERS, Contestant
from snowskin.tools.bench.transfer.shape import Shape
from snowskin.transport.runs import Run

if TYPE_CHECKING:
    from snowskin.tools.bench.transfer.pair import Pair

CALL_COSTS_US = (0, 50, 500)
GOAL_CALLS = 4
GOAL_FLOWKV = 0.10  # of the paged time, where calls dominate
GOAL_PD_SERVE = 0.54
TCP = Contestant(
    name="tcp calls", backend="ours", pair=OTHERS, options={"scheme": "tcp"}, is_free=True
)
GLOO = Contestant(name="gloo", backend="gloo", pair="gloo", is_free=True, is_chatty=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """One request's KV: `num_tokens` of a small model with grouped-query attention."""

    num_tokens: int = 1024
    block_size: int = 16
    num_layers: int = 16
    token_nbytes: int = 256  # of K, or of V, in one layer

    @property
    def num_blocks(self) -> int:
        """Blocks of the request."""
        return self.num_tokens // self.block_size

    @property
    def chunk_nbytes(self) -> int:
        """K or V of one block in one layer."""
        return self.block_size * self.token_nbytes

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.num_blocks * 2 * self.num_layers * self.chunk_nbytes


SMOKE_GEOMETRY = Geometry(num_tokens=64, num_layers=2)


def layer_major(geometry: Geometry, *, seed: int = 5) -> Shape:
    """Chunks of `[layer][K/V][block]`, the request's blocks at random places among as many again, on both sides."""
    random = np.random.default_rng(seed)
    num_places = 2 * geometry.num_blocks
    remote = random.permutation(num_places)[: geometry.num_blocks].tolist()
    local = random.permutation(num_places)[: geometry.num_blocks].tolist()
    size = geometry.chunk_nbytes
    planes = range(0, 2 * geometry.num_layers * num_places, num_places)
    runs = tuple(
        Run((plane + there) * size, (plane + here) * size, size)
        for plane in planes
        for there, here in zip(remote, local, strict=True)
    )
    return Shape(name="paged, layer-major", runs=runs, repeat=1)


def block_major(geometry: Geometry, *, seed: int = 5) -> Shape:
    """Whole blocks, all layers of one together, at random places."""
    random = np.random.default_rng(seed)
    places = random.permutation(2 * geometry.num_blocks)[: geometry.num_blocks].tolist()
    size = geometry.nbytes // geometry.num_blocks
    runs = tuple(Run(place * size, index * size, size) for index, place in enumerate(places))
    return Shape(name="paged, block-major", runs=runs, repeat=1)


def segment(geometry: Geometry) -> Shape:
    """One contiguous range."""
    return Shape(name="segment", runs=(Run(0, 0, geometry.nbytes),), repeat=1)


def calls_rows(
    pairs: dict[str, Pair], geometry: Geometry, *, rounds: int, with_gloo: bool
) -> list[Row]:
    """Calls per request, and seconds at every cost of a call, against the layer-major pages of the same round."""
    paged, blocks, whole = layer_major(geometry), block_major(geometry), segment(geometry)
    goal = Goal(of="value", relation="<=", bound=GOAL_CALLS)
    rows = [
        make_row(f"calls per request: {shape.name}", [len(shape.runs)], "calls", goal=judged)
        for shape, judged in ((paged, None), (blocks, None), (whole, goal))
    ]
    tcp = pairs[TCP.pair]
    for cost_us in CALL_COSTS_US:
        cases = {
            f"tcp, {paged.name}": (tcp, TCP.name, paged, True),
            f"tcp, {blocks.name}": (tcp, TCP.name, blocks, True),
            f"tcp, {whole.name}": (tcp, TCP.name, whole, True),
            "tcp, layer-major in one batch": (tcp, TCP.name, paged, False),
        }
        if with_gloo:
            gloo = pairs[GLOO.pair]
            cases |= {
                f"gloo send/recv, {paged.name}": (gloo, GLOO.name, paged, False),
                f"gloo send/recv, {whole.name}": (gloo, GLOO.name, whole, False),
            }
        rows += _cost_rows(cases, cost_us, rounds)
    return rows


def _cost_rows(
    cases: dict[str, tuple[Pair, str, Shape, bool]], cost_us: int, rounds: int
) -> list[Row]:
    names = list(cases)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for case, (pair, contestant, shape, is_one_by_one) in cases.items():
        pair.prepare_calls(
            contestant,
            shape,
            f"{case}, {cost_us}",
            cost_us=cost_us,
            is_one_by_one=is_one_by_one,
            num_calls=len(shape.runs) if pair.name == GLOO.pair else 1,
        )
    for round_index in range(rounds):
        first = round_index % len(names)
        for case in names[first:] + names[:first]:
            samples[case].append(cases[case][0].pull_case(f"{case}, {cost_us}") * 1e3)
    reference = names[0]
    return [
        make_paired_row(
            f"{case}: time of a request at {cost_us} us a call",
            samples[case],
            "ms",
            reference=(reference, samples[reference]),
            goal=_goal(case, cost_us),
        )
        for case in names[1:]
    ]


def _goal(case: str, cost_us: int) -> Goal | None:
    if case != "tcp, segment":
        return None
    return Goal(of="ratio", relation="<=", bound=GOAL_FLOWKV if cost_us else GOAL_PD_SERVE)


def late_joiner(pairs: dict[str, Pair], geometry: Geometry) -> tuple[list[Row], list[str]]:
    """A third process joins while both groups are at work: its first pull over ours, and what the other one says."""
    first_ms = pairs[TCP.pair].join_late(TCP.name, segment(geometry))
    rows = [
        make_row(
            "late joiner: attach, pull and verify over tcp, no other part taking notice",
            [first_ms],
            "ms",
        )
    ]
    if GLOO.pair not in pairs:
        return rows, []
    why = pairs[GLOO.pair].refused_late(GLOO.name)
    told = f"NOT POSSIBLE for a late joiner: gloo, whose group has a fixed size, answers: {why}"
    return rows, [told] if why else ["late joiner: gloo let it in"]

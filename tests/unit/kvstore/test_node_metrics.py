"""What a node shows is its account, whole: every counter that it keeps, every byte of its pools."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from snowskin.kvstore.messages import NodeStat, PoolStat
from snowskin.kvstore.metrics import Metrics
from snowskin.kvstore.node import metrics as node_metrics
from snowskin.kvstore.node.door import CallMeter
from snowskin.kvstore.node.metrics import COUNTERS, NodeMetrics

STAT = NodeStat(
    node_id="node-0",
    node_epoch=7,
    pools=(
        PoolStat(
            pool_id=3,
            tier="dram",
            tenant="default",
            capacity_nbytes=100,
            free_nbytes=40,
            committed_nbytes=30,
            reserved_nbytes=20,
            quarantined_nbytes=10,
            largest_hole_nbytes=25,
            leased_nbytes=5,
        ),
    ),
    num_blocks=11,
    num_read_leases=12,
    num_write_leases=13,
    num_sessions=14,
    num_waiting_matches=15,
    num_waiting_reserves=16,
    counters={"matches": 17, "blocks_evicted": 18},
    draining=True,
)


class SlowPath:
    read_nbytes = 3
    written_nbytes = 4


class Lending:
    lent_nbytes = 21
    forsaken_nbytes = 22
    num_reclaimed = 23
    unit_nbytes = 10


class Watchers:
    num_dropped = 2

    def __len__(self) -> int:
        return 1


def shown(stat=STAT):
    """Every sample of a scrape, by name and labels."""
    metrics, door = Metrics("node"), CallMeter()
    door.num_calls = 19
    door.seconds.observe(3e-5, "match")
    NodeMetrics(
        metrics,
        lambda: stat,
        door=door,
        watchers=Watchers(),  # type: ignore[arg-type]
        slow_path=SlowPath(),
        lendings={3: Lending()},  # type: ignore[dict-item]
    )
    return {
        (sample.name.removeprefix("snowskin_node_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
        if sample.name.startswith("snowskin_node_")
    }


def test_a_pool_is_shown_to_the_byte():
    found = shown()
    pool = ("3", "default", "dram")  # labels come in the order of the alphabet
    sizes = {size: found[f"pool_{size}_bytes", *pool] for size in node_metrics.POOL_SIZES}
    assert sizes == {
        "capacity": 100,
        "free": 40,
        "committed": 30,
        "reserved": 20,
        "quarantined": 10,
        "leased": 5,
        "largest_hole": 25,
    }


def test_what_is_lent_of_a_pool_is_shown():
    found = shown()
    assert found["pool_lent_bytes", "3"] == 21
    assert found["pool_forsaken_bytes", "3"] == 22
    assert found["pool_reclaimed_bytes_total", "3"] == 230


def test_the_account_is_shown_as_it_is_at_the_scrape():
    found = shown()
    assert found["blocks",] == 11
    assert found["leases", "read"] == 12
    assert found["leases", "write"] == 13
    assert found["sessions",] == 14
    assert found["waiting", "match"] == 15
    assert found["waiting", "reserve"] == 16
    assert found["draining",] == 1
    assert found["watchers",] == 1
    assert found["watchers_dropped_total",] == 2
    assert found["door_calls_total",] == 19
    assert found["door_seconds_count", "match"] == 1


def test_a_counter_that_never_counted_is_shown_as_0():
    found = shown()
    assert found["matches_total",] == 17
    assert found["blocks_evicted_total",] == 18
    assert found["blocks_corrupt_total",] == 0


def test_every_counter_of_the_node_is_described():
    folder = Path(node_metrics.__file__).parent
    kept = {
        name
        for path in folder.glob("*.py")
        for name in re.findall(r"""counters\[\s*"(\w+)"\s*\]""", path.read_text())
    }
    assert kept, "the node keeps its counters in another way: look for them in another way"
    assert kept == set(COUNTERS), "describe each in kvstore/node/metrics.py and docs/metrics.md"

"""Metrics of a process: what is counted comes out as Prometheus reads it, and nothing is shared."""

from __future__ import annotations

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from snowskin.kvstore.metrics import CALL_S, REQUEST_S, SHORT_S, Metrics


def scraped(metrics):
    """Families by name, as a scrape finds them."""
    text = metrics.exposition().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(family):
    """Value of each sample, by its name's ending and its labels."""
    return {
        (sample.name.removeprefix(family.name), *sorted(sample.labels.items())): sample.value
        for sample in family.samples
    }


def test_every_role_shows_its_build_and_its_process():
    found = scraped(Metrics("node"))
    (build,) = found["snowskin_build_info"].samples
    assert build.labels["role"] == "node"
    assert build.labels["wire_version"] == "1"
    assert build.labels["version"]
    assert found["process_resident_memory_bytes"].samples[0].value > 1 << 20


def test_a_counter_without_labels_is_there_before_anything_happened():
    metrics = Metrics("node")
    counter = metrics.counter("things_total", "Things.")
    assert values(scraped(metrics)["snowskin_node_things"]) == {("_total",): 0}
    counter.add()
    counter.add(2.5)
    assert values(scraped(metrics)["snowskin_node_things"]) == {("_total",): 3.5}


def test_a_counter_with_labels_counts_each_combination_and_shows_those_expected():
    metrics = Metrics("node")
    counter = metrics.counter("things_total", "Things.", ("kind", "size"))
    counter.expect("a", "large")
    counter.add(2, "b", "small")
    counter.expect("b", "small")
    assert values(scraped(metrics)["snowskin_node_things"]) == {
        ("_total", ("kind", "a"), ("size", "large")): 0,
        ("_total", ("kind", "b"), ("size", "small")): 2,
    }


def test_a_histogram_counts_up_to_each_bound_and_sums():
    metrics = Metrics("node")
    histogram = metrics.histogram("wait_seconds", "Waits.", bounds=(0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(seconds)
    family = scraped(metrics)["snowskin_node_wait_seconds"]
    assert family.type == "histogram"
    assert values(family) == {
        ("_bucket", ("le", "0.1")): 2,  # a bound belongs to its bucket
        ("_bucket", ("le", "1.0")): 3,
        ("_bucket", ("le", "+Inf")): 4,
        ("_count",): 4,
        ("_sum",): pytest.approx(7.65),
    }


def test_a_family_with_labels_is_declared_before_its_first_sample():
    metrics = Metrics("node")
    metrics.histogram("wait_seconds", "Waits.", ("method",), bounds=(1.0,))
    found = scraped(metrics)["snowskin_node_wait_seconds"]
    assert found.type == "histogram"
    assert found.samples == []


def test_a_source_is_read_at_each_scrape():
    metrics = Metrics("node")
    level = [1.0]
    metrics.read(lambda: [GaugeMetricFamily("snowskin_node_level", "Level.", value=level[0])])
    assert scraped(metrics)["snowskin_node_level"].samples[0].value == 1.0
    level[0] = 2.0
    assert scraped(metrics)["snowskin_node_level"].samples[0].value == 2.0


def test_two_roles_in_one_process_share_nothing():
    one, other = Metrics("node"), Metrics("conductor")
    one.counter("things_total", "Things.").add()
    assert "snowskin_node_things" not in scraped(other)
    assert "snowskin_conductor_things" not in scraped(one)


@pytest.mark.parametrize("bounds", [SHORT_S, CALL_S, REQUEST_S])
def test_bounds_rise(bounds):
    assert list(bounds) == sorted(set(bounds))

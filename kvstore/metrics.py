"""What a process counts about itself, and how Prometheus reads it: `/metrics`.

Rules kept here: every process has a registry of its own, nothing is global; a name says what is
counted and in what unit, `snowskin_<role>_<thing>_{seconds,bytes,total}`, and has its row in
docs/metrics.md; labels have few values, all known beforehand: never a request, a key, an address.
What is known anyway (states, loads) is read at the scrape; only what passes by is counted as it
passes, in plain lists: an `observe` costs a tenth of the client library's (0.13 against 1.2 µs,
with one label).
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from snowskin.kvstore.messages import WIRE_VERSION

# What every Prometheus reads; no name of ours needs a later version's quotes.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# From a call of the local door to a long request; each bound is 2 to 2.5 times the one before.
SHORT_S = (1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 0.1)
CALL_S = (2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
REQUEST_S = (5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

Source = Callable[[], Iterable[Metric]]
"""Reads what is known at the scrape; runs where /metrics is served, in the event loop."""


class Counter:
    """A number that only rises, one for each combination of labels."""

    def __init__(self, name: str, help: str, labels: tuple[str, ...] = ()) -> None:
        """Nothing counted; without labels it is shown as 0."""
        self._name = name
        self._help = help
        self._labels = labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, value: float = 1, *labels: str) -> None:
        """Counts `value` more; `labels` in the order of the declaration."""
        self._values[labels] = self._values.get(labels, 0) + value

    def expect(self, *labels: str) -> None:
        """Shows 0 from the start, so that a rate is known from the first event on."""
        self._values.setdefault(labels, 0)

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        yield family


class _Series:
    """Observations of one combination of labels."""

    __slots__ = ("counts", "total")

    def __init__(self, num_bounds: int) -> None:
        self.counts = [0] * (num_bounds + 1)
        self.total = 0.0


class Histogram:
    """How often a number of seconds was at most each bound, one for each combination of labels."""

    def __init__(
        self, name: str, help: str, labels: tuple[str, ...] = (), *, bounds: tuple[float, ...]
    ) -> None:
        """Nothing observed; `bounds` rise."""
        self._name = name
        self._help = help
        self._labels = labels
        self._bounds = bounds
        self._series: dict[tuple[str, ...], _Series] = {}
        if not labels:
            self._series[()] = _Series(len(bounds))

    def observe(self, value: float, *labels: str) -> None:
        """Takes one more; `labels` in the order of the declaration."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(len(self._bounds))
        series.counts[bisect_left(self._bounds, value)] += 1
        series.total += value

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        names = [*(repr(bound) for bound in self._bounds), "+Inf"]
        for labels, series in self._series.items():
            buckets = list(zip(names, accumulate(series.counts), strict=True))
            family.add_metric(labels, buckets, series.total)
        yield family


class _Read(Collector):
    """A source, or a family of ours, as the registry wants it."""

    def __init__(self, source: Source) -> None:
        self.collect = source  # type: ignore[method-assign]  # the source is the method

    def collect(self) -> Iterable[Metric]:  # pragma: no cover  replaced for each one
        return ()


class Metrics:
    """All that one process shows at /metrics."""

    def __init__(self, role: str) -> None:
        """With what every role shows: its build, and what the kernel says of the process."""
        self.role = role
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.read(self._build_info)

    def counter(self, thing: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
        """A counter `snowskin_<role>_<thing>`; `thing` ends with its unit and `total`."""
        counter = Counter(self.name(thing), help, labels)
        self.read(counter.collect)
        return counter

    def histogram(
        self, thing: str, help: str, labels: tuple[str, ...] = (), *, bounds: tuple[float, ...]
    ) -> Histogram:
        """A histogram `snowskin_<role>_<thing>`; `thing` ends with its unit."""
        histogram = Histogram(self.name(thing), help, labels, bounds=bounds)
        self.read(histogram.collect)
        return histogram

    def read(self, source: Source) -> None:
        """Has `source` read at every scrape."""
        self.registry.register(_Read(source))

    def name(self, thing: str) -> str:
        """The whole name of a thing of this role."""
        return f"snowskin_{self.role}_{thing}"

    def gauge(
        self,
        thing: str,
        help: str,
        values: Iterable[tuple[tuple[str, ...], float]],
        labels: tuple[str, ...] = (),
    ) -> Metric:
        """For sources: numbers that rise and fall, as (labels, value)."""
        return _filled(GaugeMetricFamily(self.name(thing), help, labels=labels), values)

    def total(
        self,
        thing: str,
        help: str,
        values: Iterable[tuple[tuple[str, ...], float]],
        labels: tuple[str, ...] = (),
    ) -> Metric:
        """For sources: numbers that only rise and that somebody else counts, as (labels, value)."""
        return _filled(CounterMetricFamily(self.name(thing), help, labels=labels), values)

    def exposition(self) -> bytes:
        """What a scrape is answered with, in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)

    def _build_info(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "snowskin_build_info",
            "1; the labels say what runs.",
            labels=("role", "version", "wire_version", "python_version"),
        )
        family.add_metric(
            (self.role, own_version(), str(WIRE_VERSION), platform.python_version()), 1
        )
        yield family


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily,
    values: Iterable[tuple[tuple[str, ...], float]],
) -> Metric:
    """The family with a sample for each (labels, value)."""
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def own_version() -> str:
    """The version of this package; `unknown` in a tree that was never installed."""
    try:
        return version("snowskin")
    except PackageNotFoundError:
        return "unknown"

"""What a process shows at /metrics of the transports that it moves bytes by.

Rules kept here: transports count, this reads; a scheme that is not open is not shown. Names and units: docs/metrics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client.core import Metric

    from snowskin.kvstore.metrics import Metrics
    from snowskin.transport.api import TransportStatistics

SCHEME = ("scheme",)


class TransportMetrics:
    """Reads the statistics of a process's transports, by scheme."""

    def __init__(
        self, metrics: Metrics, statistics: Callable[[], Mapping[str, TransportStatistics]]
    ) -> None:
        """Is read with `metrics` from now on."""
        self._metrics = metrics
        self._statistics = statistics
        metrics.read(self._read)

    def _read(self) -> Iterable[Metric]:
        metrics, shown = self._metrics, self._statistics()
        yield metrics.total(
            "transport_bytes_total",
            "Bytes moved: pulled and pushed by this process, served to those who pulled and pushed here.",
            [
                ((scheme, direction), nbytes)
                for scheme, said in shown.items()
                for direction, nbytes in (
                    ("pulled", said.pulled_nbytes),
                    ("pushed", said.pushed_nbytes),
                    ("served", said.served_nbytes),
                )
            ],
            ("scheme", "direction"),
        )
        yield metrics.total(
            "transport_transfers_total",
            "Transfers that were completed: by this process, or served by it.",
            [
                ((scheme, direction), number)
                for scheme, said in shown.items()
                for direction, number in (
                    ("pulled", said.num_pulls),
                    ("pushed", said.num_pushes),
                    ("served", said.num_served),
                )
            ],
            ("scheme", "direction"),
        )
        yield metrics.total(
            "transport_failures_total",
            "Transfers of this process that failed, by how; and those served here that ended on the way.",
            [
                ((scheme, how), number)
                for scheme, said in shown.items()
                for how, number in (
                    ("refused", said.num_refused),
                    ("timed_out", said.num_timed_out),
                    ("cancelled", said.num_cancelled),
                    ("lost", said.num_lost),
                    ("served", said.num_served_failed),
                )
            ],
            ("scheme", "how"),
        )
        yield metrics.total(
            "transport_refused_total",
            "What peers were refused here, by the error's reason.",
            [
                ((scheme, reason), number)
                for scheme, said in shown.items()
                for reason, number in said.refused_by_reason
            ],
            ("scheme", "reason"),
        )
        yield metrics.total(
            "transport_peers_lost_total",
            "Peers whose connections broke or fell silent.",
            [((scheme,), said.num_peers_lost) for scheme, said in shown.items()],
            SCHEME,
        )
        yield metrics.gauge(
            "transport_connections",
            "Connections open now, idle ones included.",
            [((scheme,), said.num_connections) for scheme, said in shown.items()],
            SCHEME,
        )
        yield metrics.gauge(
            "transport_grants",
            "Grants that peers hold now: one for each lease and pool.",
            [((scheme,), said.num_grants) for scheme, said in shown.items()],
            SCHEME,
        )
        yield metrics.gauge(
            "transport_regions_in_use",
            "Regions of peers that this process moves bytes of now.",
            [((scheme,), said.num_attached) for scheme, said in shown.items()],
            SCHEME,
        )

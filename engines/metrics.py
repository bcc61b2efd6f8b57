"""What a prefill or decode instance shows at /metrics.

Rules kept here: what an instance knows of itself is read at the scrape; what a request cost is
counted when it has finished, from the account that its answer carries. Of a request that did not
finish only the computed tokens are seen. Names and units: docs/metrics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.engines.messages import DecodeStats, InstanceLoad, PrefillStats
from snowskin.kvstore.client.breaker import BreakerState
from snowskin.kvstore.metrics import CALL_S, REQUEST_S

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.core import Metric

    from snowskin.engines.decode import DecodeInstance
    from snowskin.engines.link import StoreLink
    from snowskin.engines.prefill import PrefillInstance
    from snowskin.kvstore.metrics import Metrics

STATE = ("state",)


class EngineMetrics:
    """Of one instance.

    Attributes:
        step_s: seconds of the model's steps; `ModelRunner` observes them.
    """

    def __init__(
        self, metrics: Metrics, instance: PrefillInstance | DecodeInstance, link: StoreLink
    ) -> None:
        """Is read with `metrics` from now on; `link` leads to the instance's own node."""
        self._metrics = metrics
        self._instance = instance
        self._link = link
        self.step_s = metrics.histogram(
            "step_seconds", "Seconds of one step of the model over one batch.", bounds=CALL_S
        )
        self._pull_s = metrics.histogram(
            "pull_seconds",
            "Seconds in which a request's blocks were read, waits for their writer apart.",
            bounds=CALL_S,
        )
        self._blocks_pulled = metrics.counter("blocks_pulled_total", "Blocks read from nodes.")
        self._pull_nbytes = metrics.counter("pull_bytes_total", "Bytes read from nodes.")
        self._blocks_published = metrics.counter(
            "blocks_published_total", "Blocks that were new to the node; tails are none."
        )
        self._publish_nbytes = metrics.counter(
            "publish_bytes_total", "Bytes written to the node, tails included."
        )
        self._blocks_corrupt = metrics.counter(
            "blocks_corrupt_total", "Blocks whose bytes did not match their checksum."
        )
        metrics.read(self._read)

    def finished(self, stats: PrefillStats | DecodeStats) -> None:
        """A request is done."""
        self._pull_s.observe(stats.pull_s)
        self._blocks_pulled.add(stats.num_blocks_pulled)
        self._pull_nbytes.add(stats.pulled_nbytes)
        self._blocks_published.add(stats.num_blocks_published)
        self._publish_nbytes.add(stats.published_nbytes)
        self._blocks_corrupt.add(stats.num_blocks_corrupt)

    def _read(self) -> Iterable[Metric]:
        metrics, instance, load = self._metrics, self._instance, self._instance.load()
        num_held = load.num_kv_blocks - load.num_kv_blocks_free
        yield metrics.gauge(
            "requests",
            "Requests: waiting for KV memory, their turn or their hand-off; or computing.",
            [(("waiting",), load.num_waiting), (("running",), load.num_running)],
            STATE,
        )
        yield metrics.gauge(
            "waiting_tokens", "Prompt tokens not computed yet.", [((), load.num_waiting_tokens)]
        )
        yield metrics.gauge(
            "kv_blocks",
            "Blocks of the instance's own KV memory.",
            [(("free",), load.num_kv_blocks_free), (("held",), num_held)],
            STATE,
        )
        yield metrics.total(
            "tokens_computed_total",
            "Tokens that passed the model's first layer.",
            [((), load.num_tokens_computed)],
        )
        yield metrics.total(
            "pull_failures_total",
            "Pulls that ended with an error; what they would have brought is computed.",
            [((), instance.num_pull_failures)],
        )
        yield metrics.total(
            "publish_failures_total",
            "Requests whose KV could not be published whole.",
            [((), instance.num_publish_failures)],
        )
        yield metrics.gauge(
            "draining", "1 while no new requests are taken.", [((), instance.draining)]
        )
        yield from self._read_nodes(load)

    def _read_nodes(self, load: InstanceLoad) -> Iterable[Metric]:
        metrics, breaker = self._metrics, self._link.guard.breaker
        yield metrics.gauge(
            "node_connected", "1 while the own node is connected.", [((), self._link.connected)]
        )
        yield metrics.gauge(
            "node_breaker",
            "1 for the state that the own node's breaker is in; only closed, requests ask the node.",
            [((state,), state is breaker.state) for state in BreakerState],
            STATE,
        )
        yield metrics.total(
            "node_calls_refused_total",
            "Calls that the own node was spared because its breaker was open.",
            [((), breaker.num_refused)],
        )
        yield metrics.gauge(
            "nodes_silent",
            "Nodes, the own one or others, that are left alone because they do not answer.",
            [((), load.num_nodes_silent)],
        )
        yield metrics.total(
            "node_silences_total", "How often a node was left alone.", [((), load.num_silences)]
        )
        yield metrics.total(
            "node_calls_late_total",
            "Calls to nodes that were given up because no answer came in time.",
            [((), load.num_calls_late)],
        )


class PrefillMetrics(EngineMetrics):
    """Of a prefill instance."""

    def __init__(self, metrics: Metrics, instance: PrefillInstance, link: StoreLink) -> None:
        """As `EngineMetrics`."""
        super().__init__(metrics, instance, link)
        self._queue_s = metrics.histogram(
            "queue_seconds", "Seconds before a prompt's turn came.", bounds=REQUEST_S
        )
        self._publish_s = metrics.histogram(
            "publish_seconds",
            "Seconds of publishing of a request, most of them while the model computed.",
            bounds=CALL_S,
        )
        self._prompt_tokens = metrics.counter("prompt_tokens_total", "Tokens of finished prompts.")
        self._cached_tokens = metrics.counter(
            "tokens_cached_total", "Of these, tokens whose KV was pulled and not computed."
        )

    def finished(self, stats: PrefillStats | DecodeStats) -> None:
        """A prompt is done."""
        assert isinstance(stats, PrefillStats), "a prefill instance prefills"
        super().finished(stats)
        self._queue_s.observe(stats.queue_s)
        self._publish_s.observe(stats.publish_s)
        self._prompt_tokens.add(stats.num_prompt_tokens)
        self._cached_tokens.add(stats.num_cached_tokens)


class DecodeMetrics(EngineMetrics):
    """Of a decode instance."""

    def __init__(self, metrics: Metrics, instance: DecodeInstance, link: StoreLink) -> None:
        """As `EngineMetrics`."""
        super().__init__(metrics, instance, link)
        self._handoff_s = metrics.histogram(
            "handoff_seconds",
            "Seconds from the start of a decode to its hand-off.",
            bounds=REQUEST_S,
        )
        self._first_byte_s = metrics.histogram(
            "first_byte_seconds",
            "Seconds from the start of a decode to the first KV byte; only where one came.",
            bounds=REQUEST_S,
        )
        self._generated = metrics.counter(
            "tokens_generated_total", "Tokens of finished answers, the first one of each apart."
        )
        self._recomputed = metrics.counter(
            "tokens_recomputed_total", "Prompt tokens computed here because their KV was lost."
        )

    def finished(self, stats: PrefillStats | DecodeStats) -> None:
        """An answer is done."""
        assert isinstance(stats, DecodeStats), "a decode instance decodes"
        super().finished(stats)
        self._handoff_s.observe(stats.handoff_s)
        if stats.first_byte_s:
            self._first_byte_s.observe(stats.first_byte_s)
        self._generated.add(stats.num_generated_tokens)
        self._recomputed.add(stats.num_recomputed_tokens)

"""What the conductor shows at /metrics: requests as their users see them, and its view of instances.

Rules kept here: TTFT counts from the arrival at the conductor to its first token out; a TBT is one
gap between two tokens, and where several came at once the gap is shared out among them; a TPOT is
one request's mean; the three are never mixed. Names and units: docs/metrics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.engines.conductor.errors import NoInstanceReady, RequestRefused
from snowskin.engines.conductor.request import RefusalReason, Stage
from snowskin.engines.conductor.state import Outcome
from snowskin.engines.conductor.view import InstanceState
from snowskin.kvstore.directory.view import Sync
from snowskin.kvstore.metrics import CALL_S, REQUEST_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client.core import Metric
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from snowskin.engines.conductor.job import JobReport
    from snowskin.engines.conductor.state import ConductorState
    from snowskin.engines.conductor.view import ClusterView
    from snowskin.kvstore.clock import Clock
    from snowskin.kvstore.directory.view import NodeKnowledge
    from snowskin.kvstore.metrics import Metrics
    from snowskin.transport.errors import SnowskinError

OTHER = "other"  # what a user can make up must not become a label
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/healthz", "/metrics")


class ConductorMetrics:
    """Of one conductor."""

    def __init__(
        self,
        metrics: Metrics,
        state: ConductorState,
        view: Callable[[], ClusterView],
        knowledge: Callable[[str], NodeKnowledge],
    ) -> None:
        """Is read with `metrics` from now on.

        Args:
            metrics: of the process.
            state: counts the requests.
            view: the instances now.
            knowledge: what the directory knows of the node at an address now.
        """
        self._metrics = metrics
        self._state = state
        self._view = view
        self._knowledge = knowledge
        self.ttft_s = metrics.histogram(
            "ttft_seconds", "Arrival of a request to its first token out.", bounds=REQUEST_S
        )
        self.tbt_s = metrics.histogram(
            "tbt_seconds", "Gap between two tokens of an answer.", bounds=CALL_S
        )
        self.tpot_s = metrics.histogram(
            "tpot_seconds",
            "Mean gap of one answer: (end - first token) / (tokens - 1).",
            bounds=CALL_S,
        )
        self.e2e_s = metrics.histogram(
            "request_seconds",
            "Arrival of a request to its end, by outcome.",
            ("outcome",),
            bounds=REQUEST_S,
        )
        self.prompt_tokens = metrics.counter(
            "prompt_tokens_total", "Tokens of prompts that were run."
        )
        self.cached_tokens = metrics.counter(
            "tokens_cached_total", "Of these, tokens that the first prefill did not compute."
        )
        self.generated_tokens = metrics.counter(
            "tokens_generated_total", "Tokens of answers, those of unfinished requests included."
        )
        self.retries = metrics.counter(
            "retries_total", "Stages that were tried again on another instance.", ("stage",)
        )
        self.refusals = metrics.counter(
            "refusals_total", "Requests that were refused, by why.", ("reason",)
        )
        self.http_responses = metrics.counter(
            "http_responses_total",
            "Answers begun, by endpoint and HTTP status.",
            ("endpoint", "status"),
        )
        for stage in Stage:
            self.retries.expect(stage)
        for reason in RefusalReason:
            self.refusals.expect(reason)
        metrics.read(self._read)

    def _read(self) -> Iterable[Metric]:
        metrics, counts, view = self._metrics, self._state.counts(), self._view()
        yield metrics.total(
            "requests_total",
            "Requests that ended, by how.",
            [((outcome,), getattr(counts, f"num_{outcome}")) for outcome in Outcome],
            ("outcome",),
        )
        yield metrics.gauge("requests_running", "Requests in flight.", [((), counts.num_running)])
        by_state = {(str(stage), str(its)): 0 for stage in Stage for its in InstanceState}
        for instance in view.instances:
            by_state[instance.role, instance.state] += 1
        yield metrics.gauge(
            "instances", "Instances that have registered.", by_state.items(), ("role", "state")
        )

        addresses = sorted({each.node_address for each in view.instances if each.node_address})
        yield from self._read_nodes([self._knowledge(address) for address in addresses])

    def _read_nodes(self, nodes: list[NodeKnowledge]) -> Iterable[Metric]:
        metrics = self._metrics
        by_sync = {(sync.replace(" ", "_"),): 0 for sync in Sync}
        for node in nodes:
            by_sync[node.sync.replace(" ", "_"),] += 1
        yield metrics.gauge(
            "nodes",
            "Nodes of these instances, by what the directory knows.",
            by_sync.items(),
            ("sync",),
        )
        yield metrics.gauge(
            "directory_blocks",
            "Blocks that the directory knows, once for each node that has them.",
            [((), sum(node.num_blocks for node in nodes))],
        )
        ages = [node.seconds_since_message for node in nodes if node.sync is Sync.IN_SYNC]
        yield metrics.gauge(
            "directory_age_seconds",
            "Since the last message of the node, of those in sync, that has been silent longest.",
            [((), max(ages, default=0.0))],
        )

    def counted(self, app: ASGIApp) -> ASGIApp:
        """`app`, its answers counted."""

        async def counting(scope: Scope, receive: Receive, send: Send) -> None:
            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    path = scope["path"]
                    endpoint = path if path in ENDPOINTS else OTHER
                    self.http_responses.add(1, endpoint, str(message["status"]))
                await send(message)

            await app(scope, receive, sending)

        return counting

    def refused(self, error: SnowskinError) -> None:
        """A request was turned away, before or after it became a job."""
        if isinstance(error, RequestRefused) and error.refusal is not None:
            self.refusals.add(1, error.refusal.reason)
        elif isinstance(error, NoInstanceReady):
            self.refusals.add(1, RefusalReason.NO_INSTANCE)

    def request(self, clock: Clock, arrived_at_s: float) -> RequestMeter:
        """Measures one request."""
        return RequestMeter(self, clock, arrived_at_s)


class RequestMeter:
    """One request under way."""

    def __init__(self, metrics: ConductorMetrics, clock: Clock, arrived_at_s: float) -> None:
        """No token came yet."""
        self._metrics = metrics
        self._clock = clock
        self._arrived_at_s = arrived_at_s
        self._first_at_s = 0.0
        self._last_at_s = 0.0
        self._num_tokens = 0

    def emitted(self, num_tokens: int) -> None:
        """So many tokens came at once."""
        now_s = self._clock.now_s()
        if not self._num_tokens:
            self._first_at_s = now_s
            self._metrics.ttft_s.observe(now_s - self._arrived_at_s)
            num_gaps = 0  # what came with the first token did not wait for one
        else:
            num_gaps = num_tokens
        for _ in range(num_gaps):
            self._metrics.tbt_s.observe((now_s - self._last_at_s) / num_gaps)
        self._num_tokens += num_tokens
        self._last_at_s = now_s

    def ended(self, outcome: Outcome, report: JobReport, error: SnowskinError | None) -> None:
        """The request is over."""
        metrics, now_s = self._metrics, self._clock.now_s()
        metrics.e2e_s.observe(now_s - self._arrived_at_s, outcome)
        if self._num_tokens > 1:
            gap_s = (self._last_at_s - self._first_at_s) / (self._num_tokens - 1)
            metrics.tpot_s.observe(gap_s)
        metrics.generated_tokens.add(self._num_tokens)
        if report.num_cached_tokens is not None:  # it was prefilled
            metrics.prompt_tokens.add(report.num_prompt_tokens)
            metrics.cached_tokens.add(report.num_cached_tokens)
        metrics.retries.add(report.num_prefill_retries, Stage.PREFILL)
        metrics.retries.add(report.num_decode_retries, Stage.DECODE)
        if error is not None:
            metrics.refused(error)

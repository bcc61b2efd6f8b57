"""The conductor's process: state, policy, gRPC and HTTP put together, and let go in order.

Rules kept here: it is announced as ready only when both doors answer; on a signal no new request is
taken, those under way get `drain_s` seconds, then everything is closed. What the conductor knows is
soft: after a restart instances register again and nothing else is needed.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snowskin.engines.conductor.admission import AdmissionLimits
from snowskin.engines.conductor.directory import SILENCE_S, Directory
from snowskin.engines.conductor.engine_client import EngineClients
from snowskin.engines.conductor.http import HttpFront
from snowskin.engines.conductor.intake import ServedModel
from snowskin.engines.conductor.metrics import ConductorMetrics
from snowskin.engines.conductor.nodes import Nodes
from snowskin.engines.conductor.pipeline import Pipeline
from snowskin.engines.conductor.policies.registry import make_policy
from snowskin.engines.conductor.run import RunLimits
from snowskin.engines.conductor.scheduler import Scheduler, SchedulerLimits
from snowskin.engines.conductor.service import (
    ADMIN_SERVICE,
    CONDUCTOR_SERVICE,
    AdminService,
    ConductorService,
)
from snowskin.engines.conductor.state import ConductorState
from snowskin.engines.model.config import ModelConfig
from snowskin.engines.model.tokenizer import Tokenizer
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.client.transports import SLOW_PATH, ClientTransports
from snowskin.kvstore.client.watch import watch
from snowskin.kvstore.clock import SystemClock
from snowskin.kvstore.config import setting
from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.messages import Access
from snowskin.kvstore.metrics import Metrics
from snowskin.kvstore.role import RoleSettings, Stop, announce_ready, tracer_of
from snowskin.kvstore.rpc import serving
from snowskin.kvstore.telemetry import get_logger, serve_app
from snowskin.v1 import admin_pb2_grpc, conductor_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROLE = "conductor"
UPKEEP_INTERVAL_S = 1.0
MISSED_REPORTS = 3  # after so many an instance is suspect
CLOSE_GRACE_S = 1.0
# It asks and tells and moves no bytes: nothing is to be opened for its leases.
NO_BYTES = ClientTransports(SLOW_PATH)

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConductorSettings(RoleSettings):
    """Settings of a conductor; its HTTP port serves the OpenAI-compatible endpoints."""

    model: str = setting("", help="Model directory: tokenizer, chat template, config.json.")
    model_name: str = setting("", help="Name in requests; empty takes the directory's name.")
    policy: str = setting("least_ttft", help="How requests are placed: least_ttft, round_robin.")
    max_requests: int = setting(256, help="Requests in flight; one more is refused.")
    max_waiting_tokens: int = setting(1 << 20, help="Prompt tokens waiting; more are refused.")
    max_ttft_s: float = setting(120.0, help="Estimated seconds to the first token, at most.")
    max_waiting_requests: int = setting(
        128, help="Requests that wait for an instance at once; more are refused."
    )
    default_max_tokens: int = setting(512, help="Tokens of an answer where a chat does not say.")
    instance_wait_s: float = setting(10.0, help="Seconds to wait for a ready instance.")
    request_timeout_s: float = setting(300.0, help="Seconds that one request may take.")
    max_retries: int = setting(2, help="Retries of prefill, and of decode, when one is lost.")
    probe_budget_s: float = setting(
        0.005, help="What a request may lose to nodes that do not answer, beyond a usual look-up."
    )
    watch_silence_s: float = setting(
        SILENCE_S, help="Seconds without news from a node, after which it is asked instead."
    )
    report_interval_s: float = setting(0.5, help="Seconds between two reports of an instance.")
    trace_ratio: float = setting(
        1.0, help="Share of requests to trace, of those whose caller does not say; 0 to 1."
    )

    def __post_init__(self) -> None:
        """Refuses settings that cannot work.

        Raises:
            BadSetting: a value is missing or out of its range.
            InsecureAddress: beyond loopback without `insecure`.
        """
        super().__post_init__()
        if not self.model:
            raise BadSetting("model is not set", hint="give the model's directory: --model DIR")
        if not 0.0 <= self.trace_ratio <= 1.0:
            raise BadSetting(f"trace_ratio is {self.trace_ratio}", hint="give 0 to 1")
        make_policy(self.policy)
        for name in ("max_requests", "default_max_tokens"):
            if getattr(self, name) < 1:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="use at least 1")
        for name in (
            *("request_timeout_s", "report_interval_s", "max_ttft_s"),
            "watch_silence_s",
        ):
            if getattr(self, name) <= 0:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="give seconds above 0")
        for name in (
            *("max_retries", "max_waiting_tokens", "max_waiting_requests"),
            *("instance_wait_s", "probe_budget_s"),
        ):
            if getattr(self, name) < 0:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="give 0 or more")


class Conductor:
    """The parts of a conductor, before any door is open."""

    def __init__(self, settings: ConductorSettings, model: ServedModel) -> None:
        """Knows no instance yet."""
        clock = SystemClock()
        self.clock = clock
        self.state = ConductorState(suspect_after_s=MISSED_REPORTS * settings.report_interval_s)
        self.nodes = Nodes(_connect, clock, budget_s=settings.probe_budget_s)
        self.directory = Directory(watch, clock, silence_s=settings.watch_silence_s)
        self.engines = EngineClients()
        self.scheduler = Scheduler(
            self.state,
            make_policy(
                settings.policy,
                limits=AdmissionLimits(
                    max_requests=settings.max_requests,
                    max_waiting_tokens=settings.max_waiting_tokens,
                    max_ttft_s=settings.max_ttft_s,
                ),
            ),
            self.nodes,
            self.directory,
            clock,
            SchedulerLimits(
                instance_wait_s=settings.instance_wait_s,
                default_max_tokens=settings.default_max_tokens,
                max_waiting=settings.max_waiting_requests,
            ),
        )
        self.metrics = Metrics(ROLE)
        counts = ConductorMetrics(
            self.metrics, self.state, self.scheduler.view, self.directory.knowledge
        )
        self.pipeline = Pipeline(
            self.scheduler,
            self.engines,
            clock,
            RunLimits(
                request_timeout_s=settings.request_timeout_s, max_retries=settings.max_retries
            ),
            metrics=counts,
        )
        self.front = HttpFront(self.pipeline, model, clock, metrics=self.metrics, counts=counts)
        self.services = (
            (
                conductor_pb2_grpc.add_ConductorServicer_to_server,
                ConductorService(
                    self.scheduler, model, clock, report_interval_s=settings.report_interval_s
                ),
            ),
            (admin_pb2_grpc.add_AdminServicer_to_server, AdminService(self.scheduler, model)),
        )

    async def upkeep(self) -> None:
        """Forgets instances that are gone, and closes what led to them; until cancelled."""
        while True:
            await asyncio.sleep(UPKEEP_INTERVAL_S)
            for instance_id in self.state.forget_silent(self.clock.now_s()):
                log.warning("instance forgotten", instance=instance_id)
            instances = self.scheduler.view().instances
            known = {(each.instance_id, each.epoch) for each in instances}
            try:
                await self.engines.close_all_but(known)
                # Looked up each time: an instance that registered meanwhile has named its node once.
                await self.nodes.keep_only(self._node_addresses())
                await self.directory.keep_only(self._node_addresses())
            except Exception as error:
                log.error("upkeep failed", error=repr(error), exc_info=error)

    def _node_addresses(self) -> set[str]:
        return {each.node_address for each in self.scheduler.view().instances}

    async def close(self) -> None:
        """Closes all connections."""
        await self.pipeline.close()
        await self.engines.close()
        await self.directory.close()
        await self.nodes.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A conductor that answers: where, and the parts of it."""

    conductor: Conductor
    address: str
    http_address: str


@asynccontextmanager
async def serving_conductor(settings: ConductorSettings) -> AsyncIterator[Serving]:
    """A conductor that answers while the block lasts; leaving it drains first.

    Raises:
        ModelMissing, ModelCorrupt, ModelUnsupported: the directory cannot be served.
        AddressInUse: a port is taken.
    """
    model = await asyncio.to_thread(_served_model, settings)
    conductor = Conductor(settings, model)
    async with AsyncExitStack() as stack:
        tracer = stack.enter_context(
            tracer_of(settings, role=ROLE, instance_id=ROLE, ratio=settings.trace_ratio)
        )
        conductor.pipeline.tracer = tracer
        stack.push_async_callback(conductor.close)
        server = await stack.enter_async_context(
            serving(
                conductor.services,
                host=settings.host,
                port=settings.port,
                service_names=(CONDUCTOR_SERVICE, ADMIN_SERVICE),
                role=ROLE,
                metrics=conductor.metrics,
                tracer=tracer,
            )
        )
        http_port = await stack.enter_async_context(
            serve_app(
                conductor.front.app(),
                settings.host,
                settings.http_port,
                insecure=settings.insecure,
                grace_s=CLOSE_GRACE_S,
            )
        )
        upkeep = asyncio.create_task(conductor.upkeep(), name="upkeep")
        stack.push_async_callback(_ended, upkeep)
        stack.push_async_callback(conductor.pipeline.drain, settings.drain_s)
        stack.push_async_callback(server.say_draining)
        yield Serving(
            conductor=conductor,
            address=server.address,
            http_address=f"{settings.host}:{http_port}",
        )


async def serve_conductor(settings: ConductorSettings, stop: Stop) -> None:
    """Serves until `stop`."""
    async with serving_conductor(settings) as served:
        announce_ready(
            settings,
            role=ROLE,
            id=ROLE,
            address=served.address,
            http_address=served.http_address,
        )
        await stop.wait()


def _served_model(settings: ConductorSettings) -> ServedModel:
    directory = Path(settings.model)
    config = ModelConfig.from_directory(directory)
    return ServedModel(
        name=settings.model_name or directory.resolve().name,
        tokenizer=Tokenizer(directory),
        vocab_size=config.vocab_size,
        created_at=int(time.time()),
    )


async def _connect(address: str) -> StoreClient:
    return await StoreClient.connect(
        address, client_name=ROLE, access=Access.READ, transports=NO_BYTES
    )


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task

"""The process of one instance: model, link to its node, service, standing with the conductor.

Rules kept here: torch is imported after its threads are set, and only by a process that computes;
what cannot work (model, settings, port) ends the start with one clear error; what may come back
(node, conductor) never does, but `/healthz` is not ok while it is away. Asked to end while it loads,
it ends before the next tensor. A drain refuses new requests and lets running ones finish.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import secrets
import socket
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from snowskin.engines.cancellation import Background
from snowskin.engines.model.config import ModelConfig
from snowskin.engines.nearest import connect_nearest
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.client.transports import ClientTransports
from snowskin.kvstore.config import TransportChoice, format_nbytes, setting
from snowskin.kvstore.data_settings import DataSettings
from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.layout import Layout
from snowskin.kvstore.metrics import Metrics
from snowskin.kvstore.role import Stop, announce_ready, tracer_of
from snowskin.kvstore.rpc import serving
from snowskin.kvstore.telemetry import HealthServer, get_logger
from snowskin.kvstore.transport_metrics import TransportMetrics
from snowskin.transport.choice import TCP, UCX

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from snowskin.engines.decode import DecodeInstance
    from snowskin.engines.limits import EngineLimits
    from snowskin.engines.link import StoreLink
    from snowskin.engines.metrics import EngineMetrics
    from snowskin.engines.model.kv_memory import KvMemory
    from snowskin.engines.model.llama import LlamaModel
    from snowskin.engines.prefill import PrefillInstance
    from snowskin.engines.registration import Registration
    from snowskin.engines.runner import ModelRunner
    from snowskin.kvstore.rpc import RpcServer
    from snowskin.kvstore.tracing import Tracer

WARM_UP_TOKENS = 128
NODE_WAIT_S = 2.0
DRAIN_LOOK_S = 0.02
REPORT_WAIT_S = 0.5

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineSettings(DataSettings):
    """Settings of a prefill or decode instance."""

    role: Literal["prefill", "decode"] = setting("prefill", help="What the instance does.")
    instance_id: str = setting("", help="Its name; role, host and process id if empty.")
    model: str = setting("", help="Hugging Face model directory.")
    model_name: str = setting("", help="Name of the model; the directory's name if empty.")
    weights_revision: str = setting(
        "", help="Hex name of the weights; a fingerprint of the files if empty."
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", help="Type of weights and KV.")
    device: str = setting("cpu", help="Where torch computes; this build needs cpu.")
    threads: int = setting(0, help="Compute threads; 0 takes one for each core.")
    node: str = setting("", help="Its own node: unix:/path of the door, or host:port.")
    node_address: str = setting("", help="gRPC address of its own node, told to others.")
    advertise_host: str = setting(
        "",
        help="Name that the conductor reaches this engine under; the host's, if it listens on all.",
    )
    conductor: str = setting("", help="gRPC address of the conductor; none if empty.")
    block_size: int = setting(16, help="Tokens of a block.")
    chunk_tokens: int = setting(512, help="Tokens of a prefill chunk, whole blocks.")
    kv_memory_nbytes: int = setting(512 << 20, help="Size of its own KV memory.")
    max_context_tokens: int = setting(
        0, help="Tokens of prompt and answer together; what model and KV memory hold if 0."
    )
    max_running: int = setting(32, help="Sequences that hold KV memory at once.")
    max_waiting: int = setting(64, help="Requests that wait; more are refused.")
    pull_timeout_s: float = setting(2.0, help="Longest pull of cached blocks.")
    publish_timeout_s: float = setting(2.0, help="Longest wait for room at the node.")
    lookup_budget_s: float = setting(
        0.01, help="What a request may lose to nodes that do not answer, beyond a usual look-up."
    )
    transport: TransportChoice = setting(
        "auto",
        help="How blocks travel: shm, tcp, ucx or grpc (slow), that one or none; auto takes the best.",
    )

    def __post_init__(self) -> None:
        """Refuses what cannot work, before anything is loaded."""
        super().__post_init__()
        if not self.model:
            raise BadSetting("no model is named", hint="give --model DIR, a model's directory")
        if not self.node:
            raise BadSetting("no node is named", hint="give --node unix:/path, or host:port")
        if self.transport == UCX:
            self.check_ucx(self.host)
        if not 0.0 < self.lookup_budget_s <= 60.0:
            raise BadSetting(
                f"lookup_budget_s is {self.lookup_budget_s}", hint="give seconds, 0.01 is usual"
            )
        if self.device != "cpu":
            raise BadSetting(f"device is {self.device!r}", hint="this build needs cpu")
        if self.threads < 0 or self.max_context_tokens < 0:
            raise BadSetting(
                f"threads is {self.threads}, max_context_tokens is {self.max_context_tokens}",
                hint="use 0 or more",
            )
        if self.block_size < 1 or self.chunk_tokens < 1 or self.chunk_tokens % self.block_size:
            raise BadSetting(
                f"chunk_tokens is {self.chunk_tokens}, block_size is {self.block_size}",
                hint="make chunk_tokens a multiple of block_size",
            )


class _LoadAbandoned(Exception):
    """The process was asked to end while it loaded the model."""


@dataclass(slots=True, kw_only=True)
class _Engine:
    """What a started instance is made of; one of `prefill` and `decode` is set."""

    runner: ModelRunner
    link: StoreLink
    limits: EngineLimits
    layout: Layout
    prefill: PrefillInstance | None = None
    decode: DecodeInstance | None = None

    @property
    def instance(self) -> PrefillInstance | DecodeInstance:
        """The one that is set."""
        instance = self.prefill or self.decode
        assert instance is not None, "an engine has one role"
        return instance


async def serve_engine(settings: EngineSettings, stop: Stop, *, verify: bool = True) -> None:
    """Serves until `stop`, then drains.

    Args:
        settings: of the process.
        stop: ends it.
        verify: whether pulled blocks are checked; False only in tests that show what checking
            prevents.

    Raises:
        ModelMissing, ModelCorrupt, ModelUnsupported: the model cannot be loaded.
        BadSetting, AddressInUse: the settings cannot work here.
    """
    instance_id = settings.instance_id or f"{settings.role}-{socket.gethostname()}-{os.getpid()}"
    config = ModelConfig.from_directory(settings.model)  # before torch: this fails fast
    _set_threads(_num_threads(settings))

    transports = ClientTransports(
        settings.transport,
        name=instance_id,
        tls=settings.tls_files(),
        ucx=settings.ucx_settings(settings.host),
        # Who may not listen beyond loopback meets no hardware by UCX.
        auto=(TCP,) if settings.ucx_stays_here(settings.host) else (UCX, TCP),
    )

    async def connect(address: str) -> StoreClient:
        return await StoreClient.connect(
            address, client_name=instance_id, verify=verify, transports=transports
        )

    async with AsyncExitStack() as stack:
        stack.callback(transports.close)
        transports.open_demanded()
        tracer = stack.enter_context(
            tracer_of(settings, role=settings.role, instance_id=instance_id)
        )
        try:
            engine = await _open_engine(settings, config, connect, transports, stop, stack)
        except _LoadAbandoned:
            log.info("model not loaded, asked to end")
            return
        link = engine.link
        background = await stack.enter_async_context(Background())
        background.start(link.run(), "link")
        if engine.decode is not None:
            background.start(engine.decode.run(), "batch")
        metrics = Metrics(settings.role)
        TransportMetrics(metrics, transports.statistics)
        server = await _open_server(settings, instance_id, engine, metrics, tracer, stack)
        registration = _registration(settings, instance_id, server.port, engine)

        health = await stack.enter_async_context(
            HealthServer(
                settings.host,
                settings.http_port,
                check=lambda: _health(settings.role, instance_id, engine, registration),
                metrics=metrics,
                insecure=settings.insecure,
            )
        )
        await _wait_for_node(link, settings.node, stop)
        if stop.is_set():  # asked to end while it started: nothing was promised to anyone yet
            return
        if registration is not None:
            background.start(registration.run(), "registration")
        announce_ready(
            settings,
            role=settings.role,
            id=instance_id,
            address=server.address,
            http_address=f"{settings.host}:{health.port}",
        )
        await background.until(stop.wait())
        await server.say_draining()
        await _drain(engine.instance, registration, settings.drain_s)


async def _open_server(
    settings: EngineSettings,
    instance_id: str,
    engine: _Engine,
    metrics: Metrics,
    tracer: Tracer | None,
    stack: AsyncExitStack,
) -> RpcServer:
    """Serves the instance by gRPC, and counts what it does, until `stack` ends."""
    from snowskin.engines.service import SERVICE_NAME, EngineService
    from snowskin.v1 import engine_pb2_grpc

    link = engine.link
    counts = _counts(engine, metrics)
    engine.runner.on_step = counts.step_s.observe
    service = EngineService(
        instance_id,
        prefill=engine.prefill,
        decode=engine.decode,
        is_node_connected=lambda: link.connected,
        on_finished=counts.finished,
    )
    stack.push_async_callback(service.close)
    return await stack.enter_async_context(
        serving(
            [(engine_pb2_grpc.add_EngineServicer_to_server, service)],
            host=settings.host,
            port=settings.port,
            service_names=[SERVICE_NAME],
            role=settings.role,
            metrics=metrics,
            tracer=tracer,
        )
    )


def _health(
    role: str, instance_id: str, engine: _Engine, registration: Registration | None
) -> tuple[bool, dict[str, object]]:
    """What `/healthz` says."""
    link = engine.link
    facts: dict[str, object] = {"role": role, "id": instance_id, "node_connected": link.connected}
    facts["node_breaker"] = str(link.guard.breaker.state)
    if registration is not None:
        facts["conductor_connected"] = registration.connected
    is_whole = link.usable and (registration is None or registration.connected)
    return is_whole and not engine.instance.draining, facts


async def _open_engine(
    settings: EngineSettings,
    config: ModelConfig,
    connect: Callable[[str], Awaitable[StoreClient]],
    transports: ClientTransports,
    stop: Stop,
    stack: AsyncExitStack,
) -> _Engine:
    """Loads the model and makes the instance; `stack` closes what it opened."""
    from snowskin.engines.decode import DecodeInstance
    from snowskin.engines.limits import EngineLimits
    from snowskin.engines.link import StoreLink
    from snowskin.engines.nodes import NodeLinks
    from snowskin.engines.prefill import PrefillInstance
    from snowskin.engines.runner import ModelRunner

    began_s = time.monotonic()
    # The loop stays free, so that a signal is heard; the thread looks for it between two tensors.
    model, memory, revision = await asyncio.to_thread(_load, settings, config, stop)
    layout = Layout(
        model=settings.model_name or _directory_name(settings.model),
        weights_revision=revision,
        dtype=settings.dtype,
        byte_order=sys.byteorder,
        block_size=settings.block_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    assert layout.block_nbytes == memory.block_nbytes, "layout and memory disagree"
    limits = EngineLimits(
        namespace=layout.namespace,
        vocab_size=config.vocab_size,
        block_size=settings.block_size,
        max_context_tokens=min(
            settings.max_context_tokens or config.max_position,
            config.max_position,
            memory.num_blocks * settings.block_size,
        ),
        chunk_tokens=settings.chunk_tokens,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        pull_timeout_s=settings.pull_timeout_s,
        publish_timeout_s=settings.publish_timeout_s,
    )
    runner = await stack.enter_async_context(ModelRunner(model, memory))

    def link_to(address: str) -> StoreLink:
        return StoreLink(
            functools.partial(connect_nearest, address, connect, transports),
            memory.host_view(),
            namespace=layout.namespace,
            block_nbytes=memory.block_nbytes,
            name=address,
            lookup_budget_s=settings.lookup_budget_s,
        )

    link = link_to(settings.node)
    nodes = NodeLinks(link, own_address=settings.node_address, link_to=link_to)
    stack.push_async_callback(nodes.close)
    engine = _Engine(runner=runner, link=link, limits=limits, layout=layout)
    if settings.role == "prefill":
        engine.prefill = PrefillInstance(runner, nodes, limits)
    else:
        engine.decode = DecodeInstance(runner, nodes, limits)
    await _warm_up(engine, memory.num_blocks * settings.block_size)
    log.info(
        "model loaded",
        model=layout.model,
        namespace=layout.namespace.hex()[:16],
        kv_blocks=memory.num_blocks,
        seconds=round(time.monotonic() - began_s, 3),
    )
    return engine


def _load(
    settings: EngineSettings, config: ModelConfig, stop: Stop
) -> tuple[LlamaModel, KvMemory, str]:
    """The model, KV memory of the wished size, and the hex name of the weights."""

    def go_on() -> None:
        if stop.is_set():
            raise _LoadAbandoned

    go_on()
    import torch

    from snowskin.engines.model.kv_memory import KvMemory
    from snowskin.engines.model.llama import DTYPES, load_model
    from snowskin.engines.model.weights import fingerprint

    torch.set_num_threads(_num_threads(settings))  # where something imported torch before us
    dtype = DTYPES[settings.dtype]
    block_nbytes = config.kv_block_nbytes(block_size=settings.block_size, itemsize=dtype.itemsize)
    num_blocks = settings.kv_memory_nbytes // block_nbytes
    if num_blocks < settings.chunk_tokens // settings.block_size:
        raise BadSetting(
            f"kv_memory_nbytes {format_nbytes(settings.kv_memory_nbytes)} is {num_blocks} blocks "
            f"of {block_nbytes} bytes, less than one chunk of {settings.chunk_tokens} tokens",
            hint="raise kv_memory_nbytes, or lower chunk_tokens",
        )
    model = load_model(settings.model, dtype, settings.device, before_each=go_on)
    go_on()
    try:
        memory = KvMemory(config, num_blocks, settings.block_size, dtype, settings.device)
    except RuntimeError as error:  # torch's word for no memory
        raise BadSetting(
            f"kv_memory_nbytes {format_nbytes(settings.kv_memory_nbytes)} is more than this host "
            "gives",
            hint="lower kv_memory_nbytes",
        ) from error
    revision = settings.weights_revision
    if not revision:
        revision = fingerprint(settings.model, before_each=go_on).hex()
    go_on()  # the warm-up comes next
    return model, memory, revision


def _counts(engine: _Engine, metrics: Metrics) -> EngineMetrics:
    from snowskin.engines.metrics import DecodeMetrics, PrefillMetrics

    if engine.prefill is not None:
        return PrefillMetrics(metrics, engine.prefill, engine.link)
    assert engine.decode is not None, "an engine has one role"
    return DecodeMetrics(metrics, engine.decode, engine.link)


async def _warm_up(engine: _Engine, max_tokens: int) -> None:
    """Pays torch's first-call costs, and measures, so that the first report is worth something."""
    num_tokens = min(WARM_UP_TOKENS, engine.limits.chunk_tokens, max_tokens)
    num_tokens = min(num_tokens, engine.limits.max_context_tokens)
    meter = engine.instance.meter
    prefill_s = await engine.runner.warm_up(num_tokens)
    decode_s = await engine.runner.warm_up(1) if engine.decode is not None else 0.0
    meter.warmed_up(num_tokens=num_tokens, prefill_s=prefill_s, decode_s=decode_s)


async def _wait_for_node(link: StoreLink, node: str, stop: Stop) -> None:
    """Gives the node a moment; an instance without one computes everything, and says so."""
    waits = [asyncio.ensure_future(each) for each in (link.wait_connected(), stop.wait())]
    try:
        ended, _ = await asyncio.wait(
            waits, timeout=NODE_WAIT_S, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        for wait in waits:
            wait.cancel()
    if not ended:
        log.warning("starting without a node, nothing is cached until it answers", node=node)


def _registration(
    settings: EngineSettings, instance_id: str, port: int, engine: _Engine
) -> Registration | None:
    from snowskin.engines.registration import Registration, told_host
    from snowskin.v1 import conductor_pb2

    if not settings.conductor:
        return None
    layout = engine.layout
    facts = conductor_pb2.RegisterRequest(
        instance_id=instance_id,
        instance_epoch=secrets.randbits(63) | 1,
        role=settings.role,
        address=f"{told_host(settings.host, advertise_host=settings.advertise_host)}:{port}",
        node_address=settings.node_address,
        namespaces=[layout.namespace],
        layout_json=json.dumps(asdict(layout), sort_keys=True),
        block_size=layout.block_size,
        block_nbytes=layout.block_nbytes,
        model_name=layout.model,
        max_context_tokens=engine.limits.max_context_tokens,
    )
    return Registration(settings.conductor, facts, engine.instance)


async def _drain(
    instance: PrefillInstance | DecodeInstance, registration: Registration | None, drain_s: float
) -> None:
    """Refuses what is new, says so, and lets what runs finish within `drain_s`."""
    instance.draining = True
    deadline_s = time.monotonic() + drain_s
    if registration is not None:
        await registration.report_now(min(REPORT_WAIT_S, drain_s))
    # Looked at, not waited for: only a drain wants to know.
    while instance.num_requests and time.monotonic() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(DRAIN_LOOK_S)
    log.info("drained", requests_cut=instance.num_requests)


def _directory_name(model: str) -> str:
    return Path(model).resolve().name


def _num_threads(settings: EngineSettings) -> int:
    return settings.threads or os.cpu_count() or 1


def _set_threads(num_threads: int) -> None:
    """Before torch is imported: OpenMP reads these once. Spinning threads starve the neighbours."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

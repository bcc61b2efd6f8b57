"""A whole cluster on this host, as child processes.

Rules kept here: nodes first, then the conductor, then the engines side by side; stopped the other way round. Everybody
listens on loopback unless told. Node and conductor come back under their old addresses, an engine under its old
name. However the block is left, by an error, a cancellation in the middle of the start, or its end, no process, no
socket and no directory stays; a second cancellation while it stops turns the drain into SIGKILL. Children die with
this process even when it is killed.

    async with LocalCluster(UpSettings(model="models/tiny", http_port=0)) as cluster:
        await httpx.AsyncClient().post(f"http://{cluster.http_address}/v1/completions", ...)
        cluster.kill("prefill-0")
        await cluster.restarted("prefill-0")
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.node.data_ports import TRANSPORTS
from snowskin.kvstore.telemetry import get_logger
from snowskin.tools.cluster.child import Forward, Ready
from snowskin.tools.cluster.directory import ClusterDirectory
from snowskin.tools.cluster.errors import ChildGivenUp, ChildUnknown, ClusterNotReady
from snowskin.tools.cluster.ports import pick_port
from snowskin.tools.cluster.supervised import ChildSpec, Supervised
from snowskin.tools.cluster.up_settings import DEFAULT_CONDUCTOR_PORT, UpSettings
from snowskin.tools.kvctl.admin import AdminClient
from snowskin.transport.choice import UCX
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

MAIN_MODULE = "snowskin.tools.cluster.main"
ENGINE_ROLES = ("prefill", "decode")
# A picked port may be taken by another process before its child binds it.
NUM_START_TRIES = 2
# What a child needs beyond its own drain to take its hands off everything.
STOP_MARGIN_S = 3.0
READY_POLL_S = 0.05

log = get_logger(__name__)


class LocalCluster:
    """Nodes, a conductor and engines; an asynchronous context manager."""

    def __init__(
        self,
        settings: UpSettings,
        *,
        engine_module: str = MAIN_MODULE,
        environment: Mapping[str, str] | None = None,
        config: Path | None = None,
        log_dir: Path | None = None,
        forward: Callable[[str, str], None] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            settings: the cluster's shape.
            engine_module: run as `python -m MODULE prefill|decode ...` for the engines; tests give their own.
            environment: added to every child's environment.
            config: TOML file that is passed on to every role.
            log_dir: where the children's output is kept as NAME.log; default in the private directory, gone at the end.
            forward: gets (name, line) of each child's output; nothing is written to files then.
        """
        self.settings = settings
        self.processes: dict[str, Supervised] = {}
        self.failed: asyncio.Future[ChildGivenUp]  # done when the cluster cannot serve any more
        self._engine_module = engine_module
        self._environment = dict(environment or {})
        self._config = config
        self._log_dir = log_dir
        self._forward = forward
        self._directory: ClusterDirectory | None = None
        self._starts_before_kill: dict[str, int] = {}
        self._num_engines = dict.fromkeys(ENGINE_ROLES, 0)
        self._hurry: asyncio.Future[None]

    # --- life

    async def __aenter__(self) -> LocalCluster:
        """Starts everything and waits until the conductor sees all instances.

        Raises:
            BadSetting: the model directory is missing, or no directory for sockets is usable.
            ChildFailed: a child did not become ready; its last lines are in the message.
            ClusterNotReady: the conductor does not see all instances.
        """
        settings = self.settings
        _check_model(settings.model)
        loop = asyncio.get_running_loop()
        self.failed = loop.create_future()
        self._hurry = loop.create_future()
        self._directory = ClusterDirectory()
        try:
            await self._start_all(
                [self._node(index) for index in range(settings.nodes)], num_tries=NUM_START_TRIES
            )
            await self._start_all([self._conductor()], num_tries=NUM_START_TRIES)
            await self._start_all(
                [
                    self._engine(role)
                    for role in ENGINE_ROLES
                    for _ in range(getattr(settings, role))
                ]
            )
            await self.wait_ready(timeout_s=settings.start_timeout_s)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops engines, then the conductor, then the nodes, and removes the directory."""
        await self._close()

    def hurry(self) -> None:
        """From now on stopping means SIGKILL at once."""
        if not self._hurry.done():
            self._hurry.set_result(None)

    async def _close(self) -> None:
        task = asyncio.create_task(self._stop_all(), name="stop cluster")
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                cancelled = error
                self.hurry()
        if cancelled is not None:
            raise cancelled

    async def _stop_all(self) -> None:
        try:
            for roles in (ENGINE_ROLES, ("conductor",), ("node",)):
                stopping = [
                    process for process in self.processes.values() if process.spec.role in roles
                ]
                await asyncio.gather(*(process.stop(hurry=self._hurry) for process in stopping))
        finally:
            if self._directory is not None:
                self._directory.close()

    async def _start_all(self, specs: list[ChildSpec], *, num_tries: int = 1) -> None:
        """Starts side by side; all are waited for also when one fails, so that none starts unseen."""
        started = [Supervised(spec, on_failure=self._on_failure) for spec in specs]
        self.processes |= {process.name: process for process in started}
        async with asyncio.TaskGroup() as tasks:
            starts = [tasks.create_task(self._start(process, num_tries)) for process in started]
        errors = [error for start in starts if (error := start.result()) is not None]
        if errors:
            raise errors[0]

    @staticmethod
    async def _start(process: Supervised, num_tries: int) -> SnowskinError | None:
        try:
            await process.start(num_tries=num_tries)
        except SnowskinError as error:
            return error
        return None

    def _on_failure(self, process: Supervised, error: ChildGivenUp) -> None:
        """One engine of several may stay dead; without the last of a role nothing can be served."""
        role = process.spec.role
        others = [
            other
            for other in self.processes.values()
            if other.spec.role == role and other.state not in ("failed", "stopped")
        ]
        if role in ENGINE_ROLES and others:
            log.error("serving without it", child=process.name, others=len(others))
        elif not self.failed.done():
            self.failed.set_result(error)

    # --- what runs

    @property
    def nodes(self) -> tuple[Ready, ...]:
        """What each node said when it was last ready."""
        return tuple(self._facts_of("node"))

    @property
    def conductor_address(self) -> str:
        """`host:port` of the conductor's gRPC."""
        return self._facts_of("conductor")[0].address

    @property
    def http_address(self) -> str:
        """`host:port` of the OpenAI-compatible HTTP."""
        return self._facts_of("conductor")[0].http_address

    def _facts_of(self, role: str) -> list[Ready]:
        return [
            process.facts
            for process in self.processes.values()
            if process.spec.role == role and process.facts is not None
        ]

    def _process(self, name: str) -> Supervised:
        try:
            return self.processes[name]
        except KeyError:
            raise ChildUnknown(f"{name} is not among {', '.join(self.processes)}") from None

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to a child; `restarted` then waits for its next start."""
        process = self._process(name)
        self._starts_before_kill[name] = process.num_starts
        process.send(number)

    async def restarted(self, name: str, *, timeout_s: float = 30.0) -> Ready:
        """Waits until the child that was killed by `kill` is ready again.

        Raises:
            ChildFailed: it is not, in time or ever.
        """
        process = self._process(name)
        before = self._starts_before_kill.pop(name, process.num_starts - 1)
        return await process.wait_ready(min_starts=before + 1, timeout_s=timeout_s)

    async def wait_ready(self, *, timeout_s: float) -> None:
        """Waits until the conductor sees every engine of this cluster ready.

        Raises:
            ClusterNotReady: it does not in time.
        """
        wanted = {
            process.name for process in self.processes.values() if process.spec.role in ENGINE_ROLES
        }
        seen: set[str] = set()
        trouble = ""
        try:
            async with (
                asyncio.timeout(timeout_s),
                AdminClient(self.conductor_address, timeout_s=1.0) as admin,
            ):
                while not wanted <= seen:
                    try:
                        status = await admin.cluster_status()
                    except SnowskinError as error:  # it may be restarting
                        trouble = f"; {error}"
                    else:
                        trouble = ""
                        seen = {
                            instance.instance_id
                            for instance in status.instances
                            if instance.state == "ready"
                        }
                    if not wanted <= seen:
                        await asyncio.sleep(READY_POLL_S)
        except TimeoutError as error:
            missing = ", ".join(sorted(wanted - seen))
            raise ClusterNotReady(
                f"the conductor does not see {missing} after {timeout_s} s{trouble}",
                hint="see their logs",
            ) from error

    async def start_engine(self, role: str, *, name: str | None = None) -> Supervised:
        """Adds an engine to the running cluster, and waits until it serves.

        Raises:
            ChildFailed: it did not become ready.
        """
        spec = self._engine(role, name)
        assert spec.name not in self.processes
        await self._start_all([spec])
        return self.processes[spec.name]

    async def stop_process(self, name: str) -> None:
        """Drains and ends one child; it is not started again."""
        await self._process(name).stop(hurry=self._hurry)

    # --- how each role is started

    def _spec(
        self,
        name: str,
        role: str,
        command: Callable[[Ready | None], list[str]],
        *,
        module: str = MAIN_MODULE,
        environment: Mapping[str, str] | None = None,
    ) -> ChildSpec:
        settings = self.settings
        directory = self._log_dir or self._path
        shared = [
            *(("--config", str(self._config)) if self._config else ()),
            *(("--host", settings.host)),
            *(("--insecure",) if settings.insecure else ()),
            *(("--log-json",) if settings.log_json else ()),
            *("--log-level", settings.log_level),
            *("--drain-s", str(settings.drain_s)),
            *("--parent-pid", str(os.getpid())),
        ]

        def whole_command(previous: Ready | None) -> list[str]:
            return [sys.executable, "-P", "-m", module, role, *shared, *command(previous)]

        return ChildSpec(
            name=name,
            role=role,
            command=whole_command,
            environment={**self._environment, **(environment or {})},
            log_path=directory / f"{name}.log",
            forward=self._forward_of(name),
            start_timeout_s=settings.start_timeout_s,
            drain_s=settings.drain_s + STOP_MARGIN_S,
            restart=settings.restart,
            hang_s=settings.hang_s,
        )

    @property
    def _path(self) -> Path:
        assert self._directory is not None
        return self._directory.path

    def _forward_of(self, name: str) -> Forward | None:
        forward = self._forward
        return None if forward is None else lambda line: forward(name, line)

    def _node(self, index: int) -> ChildSpec:
        name = f"node-{index}"

        def command(previous: Ready | None) -> list[str]:
            settings = self.settings
            return [
                *("--node-id", name),
                *("--door", str(self._path / f"{name}.sock")),
                *("--dram-nbytes", str(settings.dram_nbytes)),
                *("--port", str(_port((previous or Ready()).address, settings.host))),
                *("--http-port", "0"),
                *self._ucx_arguments(),
                *(_repeated("--transports", TRANSPORTS) if settings.transport == UCX else ()),
            ]

        return self._spec(name, "node", command)

    def _ucx_arguments(self) -> list[str]:
        """Of nodes and engines; nothing where nothing was said."""
        settings = self.settings
        arguments = []
        if settings.ucx_net_devices:
            arguments += ["--ucx-net-devices", settings.ucx_net_devices]
        if settings.ucx_tls:
            arguments += ["--ucx-tls", settings.ucx_tls]
        if settings.trusted_network:
            arguments.append("--trusted-network")
        return arguments

    def _conductor(self) -> ChildSpec:
        settings = self.settings

        def command(previous: Ready | None) -> list[str]:
            port, http_port = settings.conductor_port, settings.http_port
            before = previous or Ready()
            if not port:
                port = _port(before.address, settings.host, preferred=DEFAULT_CONDUCTOR_PORT)
            if not http_port:
                http_port = _port(before.http_address, settings.host)
            return [
                *("--model", settings.model),
                *("--port", str(port), "--http-port", str(http_port)),
            ]

        return self._spec("conductor", "conductor", command)

    def _engine(self, role: str, name: str | None = None) -> ChildSpec:
        settings = self.settings
        threads = settings.threads_per_engine
        index = self._num_engines[role]
        self._num_engines[role] += 1
        name = name or f"{role}-{index}"
        own_node = self.nodes[index % settings.nodes]
        # Through a door there is shared memory, and nothing else.
        maps = settings.transport in ("auto", "shm")

        def command(_previous: Ready | None) -> list[str]:
            return [
                *("--instance-id", name),
                *("--model", settings.model),
                *("--node", own_node.door if maps else own_node.address),
                *("--node-address", own_node.address),
                *("--conductor", self.conductor_address),
                *("--threads", str(threads)),
                *("--block-size", str(settings.block_size)),
                *("--chunk-tokens", str(settings.chunk_tokens)),
                *("--kv-memory-nbytes", str(settings.kv_memory_nbytes)),
                *("--transport", settings.transport),
                *self._ucx_arguments(),
                *("--port", "0", "--http-port", "0"),
            ]

        # Spinning OpenMP threads of several engines on the same cores cost up to 20 times the work.
        threads_environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        return self._spec(
            name, role, command, module=self._engine_module, environment=threads_environment
        )


def _repeated(flag: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def _check_model(model: str) -> None:
    if not model or not Path(model).is_dir():
        raise BadSetting(
            f"model directory {model!r} does not exist",
            hint="give --model DIR with config.json, *.safetensors and tokenizer.json",
        )


def _port(address_before: str, host: str, *, preferred: int = 0) -> int:
    """The port of the last run, so that clients find it again, or a free one."""
    if address_before:
        return int(address_before.rpartition(":")[2])
    return pick_port(host, preferred=preferred)

"""`snowskin up` as its own process: asked over HTTP, looked at from outside, its children killed and stopped.

Rules kept here: nothing of the cluster runs in the test's process, so the supervisor that restarts what
was killed is the one that users have; what the cluster holds is asked of the cluster itself (node,
conductor, engines) and of the kernel (processes, descriptors), never of its memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.messages import Access
from snowskin.kvstore.rpc import open_channel, translating
from snowskin.tools.kvctl.admin import AdminClient
from snowskin.tools.kvctl.node_admin import NodeAdminClient
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import engine_pb2, engine_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from snowskin.kvstore.messages import NodeStat

LEASE_S = GRACE_S = 1.0
# Beyond lease and grace: instances report, and the conductor lets old connections go, once a second.
SETTLE_S = LEASE_S + GRACE_S + 3.0
BLOCK_SIZE = 16
# An engine starts within two seconds; on a machine with much else to do it may take ten.
SHORT_LEASES = f"""
[conductor]
instance_wait_s = 30.0
[node]
read_lease_s = {LEASE_S}
write_lease_s = {LEASE_S}
grace_s = {GRACE_S}
"""
FLAGS = (
    *("--dram-nbytes", "256MiB", "--kv-memory-nbytes", "128MiB"),
    *("--block-size", str(BLOCK_SIZE), "--chunk-tokens", str(2 * BLOCK_SIZE), "--threads", "1"),
)
END_S = 30.0
LOOK_S = 0.02
REQUEST_S = 60.0
CAUGHT_LOOK_S = 0.001
# gRPC's channels to one address share a connection, or have one each, by when they were opened.
SHARED_FDS = 1
# What a client has of a node's memory: a pool and a release board, each as descriptor and as mapping.
MEMFDS_PER_NODE = 4

_HTTP = re.compile(r"http://(\S+)/v1")
_CONDUCTOR = re.compile(r"conductor: (\S+)")
_NODE = re.compile(r"node-\d+: (\S+)\s+door (\S+)")


async def eventually(look, within_s: float, what: str = ""):
    """The first true value of `look()`, which may be a coroutine; other processes have no event for us."""
    deadline_s = time.monotonic() + within_s
    while True:
        value = look()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline_s, f"not so within {within_s} s: {what or look}"
        await asyncio.sleep(LOOK_S)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a cluster holds while nobody asks it for anything; descriptors may become fewer, never more."""

    capacity_nbytes: int
    unaccounted_nbytes: int
    reserved_nbytes: int
    quarantined_nbytes: int
    leased_nbytes: int
    num_leases: int
    num_waiting: int
    num_sessions: int
    num_requests_running: int
    engines_busy: tuple[str, ...]
    num_processes: int
    num_fds: dict[str, int]
    num_memfds: dict[str, int]

    def kept_to(self, before: Held, *, num_meetings: int = 0) -> bool:
        """Whether everything is as it was, but for connections of engines to nodes new to them.

        Args:
            before: what it was.
            num_meetings: how many such connections there may be since, each with a session and its memory.
        """
        spare_fds = SHARED_FDS + 2 * num_meetings
        at_most = [
            (self.num_fds, before.num_fds, spare_fds),
            (self.num_memfds, before.num_memfds, MEMFDS_PER_NODE if num_meetings else 0),
        ]
        few_enough = all(
            now.get(name, 0) <= num + spare
            for now, then, spare in at_most
            for name, num in then.items()
        )
        num_met = self.num_sessions - before.num_sessions
        return (
            few_enough
            and 0 <= num_met <= num_meetings
            and dataclasses.replace(
                self,
                num_fds=before.num_fds,
                num_memfds=before.num_memfds,
                num_sessions=before.num_sessions,
            )
            == before
        )


@dataclass(kw_only=True)
class Answer:
    """What came back over a stream, as it comes."""

    token_ids: list[int] = field(default_factory=list)
    status: int = 0
    error: dict | None = None
    finish_reason: str = ""
    num_cached_tokens: int = 0
    stats: dict = field(default_factory=dict)
    is_whole: bool = False
    broke: str = ""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until(self, is_so: Callable[[Answer], bool], within_s: float = REQUEST_S) -> Answer:
        """Waits for `is_so(answer)`."""
        async with asyncio.timeout(within_s), self.changed:
            await self.changed.wait_for(lambda: is_so(self))
        return self

    @property
    def is_over(self) -> bool:
        return self.is_whole or bool(self.broke) or self.error is not None

    async def whole(self) -> Answer:
        """Waits for the end, which must be a good one."""
        await self.until(lambda answer: answer.is_over)
        assert self.is_whole, f"HTTP {self.status}, {self.error or self.broke}"
        return self

    def _add(self, data: str) -> None:
        if data == "[DONE]":
            self.is_whole = True
            return
        chunk = json.loads(data)
        self.error = chunk.get("error", self.error)
        self.stats = chunk.get("snowskin") or self.stats
        details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
        self.num_cached_tokens = details.get("cached_tokens", self.num_cached_tokens)
        for choice in chunk.get("choices", ()):
            self.token_ids += choice.get("token_ids") or ()
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    async def read(self, base_url: str, body: dict, headers: dict) -> None:
        """Reads a whole stream; whatever ends it is noted."""
        try:
            async with (
                httpx.AsyncClient(
                    base_url=base_url,
                    timeout=REQUEST_S,
                    trust_env=False,
                    verify=False,  # no certificates to load, which would hold the loop for 15 ms
                ) as http,
                http.stream("POST", "/v1/completions", json=body, headers=headers) as response,
            ):
                self.status = response.status_code
                if self.status != 200:
                    self.error = json.loads(await response.aread())["error"]
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        self._add(line[5:].strip())
                        async with self.changed:
                            self.changed.notify_all()
        except httpx.HTTPError as error:
            self.broke = repr(error)
        finally:
            async with self.changed:
                self.changed.notify_all()


def assert_exact(monolith, prompt: list[int], answer: Answer, num_tokens: int) -> None:
    """The answer is whole, and what the model in one piece says: no token twice, none missing."""
    assert len(answer.token_ids) == num_tokens
    assert answer.finish_reason == "length"
    agreement = monolith.compare(prompt, answer.token_ids, stopped=False)
    assert agreement.num_wrong == 0, agreement.differences


class UpProcess:
    """A cluster that `snowskin up` keeps; `with` ends it."""

    def __init__(
        self,
        model: Path,
        directory: Path,
        *flags: str,
        settings: str = "",
        num_nodes: int = 1,
        num_engines: int = 1,
    ) -> None:
        """`settings` is TOML for all roles; `num_engines` of each kind; logs and sockets lie in `directory`."""
        self.model = model
        self.engines = [f"{role}-{n}" for role in ("prefill", "decode") for n in range(num_engines)]
        self.names = [*(f"node-{n}" for n in range(num_nodes)), "conductor", *self.engines]
        self.log_path = directory / "up.log"
        self.runtime = directory / "run"
        self.runtime.mkdir()
        config = directory / "snowskin.toml"
        config.write_text(settings)
        self._command = [
            sys.executable, "-m", "snowskin.tools.cluster.main", "up", "--model", str(model),
            "--config", str(config), "--http-port", "0", "--log-json", "--nodes", str(num_nodes),
            "--prefill", str(num_engines), "--decode", str(num_engines), *flags,
        ]  # fmt: skip
        self.process: subprocess.Popen[str]
        self.http_address = self.conductor_address = ""
        self.node_addresses: tuple[str, ...] = ()

    # --- life

    def __enter__(self) -> UpProcess:
        """Returns when the cluster serves."""
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "XDG_RUNTIME_DIR": str(self.runtime)},
            )
        try:
            self._read_addresses()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _read_addresses(self) -> None:
        said = ""
        for line in self.process.stdout:  # the test's own timeout bounds it
            said += line
            if "Ctrl-C" in line:
                break
        else:
            raise AssertionError(f"up ended: {said}{self.log_path.read_text()[-2000:]}")
        (self.http_address,) = _found(_HTTP, said)
        (self.conductor_address,) = _found(_CONDUCTOR, said)
        self.node_addresses = tuple(address for address, _door in _NODE.findall(said))

    def __exit__(self, *_: object) -> None:
        self.resume_all()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.communicate(timeout=END_S)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.communicate()

    # --- processes

    def children(self) -> list[psutil.Process]:
        """Every process that this supervisor has started and that is there still."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "--parent-pid" in words:
                pid = words[words.index("--parent-pid") + 1]
                if pid == str(self.process.pid):
                    found.append(process)
        return found

    def child(self, name: str) -> psutil.Process:
        """The running child of that name, as `snowskin up` names them."""
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                words = child.cmdline()
                flag = {"node": "--node-id", "conductor": ""}.get(
                    name.partition("-")[0], "--instance-id"
                )
                if child.status() == psutil.STATUS_ZOMBIE:
                    continue
                if (flag and words[words.index(flag) + 1] == name) or (
                    not flag and "conductor" in words
                ):
                    return child
        raise AssertionError(f"{name} does not run")

    def kill(self, name: str) -> int:
        """As a crash; returns the pid that is no more."""
        child = self.child(name)
        child.kill()
        return child.pid

    def resume_all(self) -> None:
        """Lets every child go on that was stopped."""
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.resume()

    def events(self, name: str = "") -> Iterable[dict]:
        """Log lines: the supervisor's own, or those of the child `name`."""
        for line in self.log_path.read_text().splitlines():
            said_by, bar, rest = line.partition(" | ")
            is_asked_for = said_by.strip() == name if bar else not name
            text = rest if bar else line
            if is_asked_for and text.startswith("{"):
                yield json.loads(text)

    async def restarted(self, name, old_pid, within_s=30.0):
        """Waits until the supervisor says that a new `name` is ready; returns its pid."""

        def new_pid() -> int:
            pids = [
                event["pid"]
                for event in self.events()
                if event["event"] == "child ready" and event["child"] == name
            ]
            return pids[-1] if pids[-1] != old_pid else 0

        return await eventually(new_pid, within_s, f"{name} is ready again")

    async def caught(
        self, name: str, is_so: Callable[[NodeStat], bool], answer: Answer
    ) -> NodeStat:
        """Stops a child (SIGSTOP) at a moment when the node's books say `is_so`, during a request."""
        child = self.child(name)
        async with self.observing() as node:
            while not answer.is_over:
                child.suspend()
                await node.stat()  # what it had sent before it stopped is now in the books
                stat = await node.stat()
                if is_so(stat):
                    return stat
                child.resume()
                await asyncio.sleep(CAUGHT_LOOK_S)
        raise AssertionError(f"the request was over before {name} was caught: {answer}")

    # --- requests

    @contextlib.asynccontextmanager
    async def asking(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        use_cache: bool = True,
        request_id: str = "",
        **fields: Any,
    ) -> AsyncIterator[Answer]:
        """A streamed completion under way, greedy but for `fields`; leaving the block hangs up."""
        body = {
            "model": self.model.name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **fields,
        }
        headers = {"x-snowskin-stats": "1", "x-snowskin-cache": "on" if use_cache else "off"}
        if request_id:
            headers["x-request-id"] = request_id
        answer = Answer()
        task = asyncio.create_task(answer.read(f"http://{self.http_address}", body, headers))
        try:
            yield answer
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def ask(self, prompt: list[int], max_tokens: int, **options: Any) -> Answer:
        """A whole answer."""
        async with self.asking(prompt, max_tokens, **options) as answer:
            return await answer.whole()

    # --- what it holds

    @contextlib.asynccontextmanager
    async def observing(self, node: int = 0) -> AsyncIterator[StoreClient]:
        """A client of a node that only looks, by gRPC."""
        client = await StoreClient.connect(
            self.node_addresses[node],
            client_name="observer",
            access=Access.READ,
            call_timeout_s=REQUEST_S,
        )
        async with client:
            yield client

    async def held(self) -> Held:
        """What node, conductor and engines hold now."""
        async with AdminClient(self.conductor_address, timeout_s=2.0) as admin:
            status = await admin.cluster_status()
        stats = []
        for index in range(len(self.node_addresses)):
            async with self.observing(index) as node:
                stats.append(await node.stat())
        pools = [pool for stat in stats for pool in stat.pools]
        busy = [await _busy(instance.address) for instance in status.instances]
        return Held(
            capacity_nbytes=sum(pool.capacity_nbytes for pool in pools),
            unaccounted_nbytes=sum(
                pool.capacity_nbytes - pool.free_nbytes - pool.committed_nbytes for pool in pools
            ),
            reserved_nbytes=sum(pool.reserved_nbytes for pool in pools),
            quarantined_nbytes=sum(pool.quarantined_nbytes for pool in pools),
            leased_nbytes=sum(pool.leased_nbytes for pool in pools),
            num_leases=sum(stat.num_read_leases + stat.num_write_leases for stat in stats),
            num_waiting=sum(stat.num_waiting_matches + stat.num_waiting_reserves for stat in stats),
            num_sessions=sum(stat.num_sessions for stat in stats),
            num_requests_running=status.num_requests_running,
            engines_busy=tuple(busy),
            num_processes=len(self.children()),
            num_fds={name: self.child(name).num_fds() for name in self.names},
            num_memfds={name: _num_memfds(self.child(name)) for name in self.names},
        )

    async def evict_all(self) -> None:
        """Takes every block out of every node, as `kvctl evict --all` does."""
        for address in self.node_addresses:
            async with NodeAdminClient(address, timeout_s=5.0) as node:
                await node.evict((), dry_run=False)

    async def settled(self, within_s=30.0):
        """What it holds once every instance is ready, idle, and connected to its node."""

        async def is_idle() -> Held | None:
            with contextlib.suppress(SnowskinError, AssertionError, psutil.NoSuchProcess):
                async with AdminClient(self.conductor_address, timeout_s=2.0) as admin:
                    status = await admin.cluster_status()
                states = [instance.state for instance in status.instances]
                held = await self.held()
                if states == ["ready"] * len(self.engines) and not any(held.engines_busy):
                    return held
            return None

        return await eventually(is_idle, within_s, "every instance is ready and idle")

    async def settles_at(self, before: Held, within_s: float, *, num_meetings: int = 0) -> None:
        """Fails unless the cluster comes to hold again what it held before."""
        now: Held | None = None

        async def is_back() -> bool:
            nonlocal now
            with contextlib.suppress(SnowskinError):
                now = await self.held()
                return now.kept_to(before, num_meetings=num_meetings)
            return False

        try:
            await eventually(is_back, within_s)
        except AssertionError:
            raise AssertionError(f"it holds {now}, before it held {before}") from None


def _found(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    match = pattern.search(text)
    assert match is not None, f"no {pattern.pattern!r} in {text!r}"
    return match.groups()


def _num_memfds(process: psutil.Process) -> int:
    """Memory of pools that a process has open or mapped: each descriptor and each mapping counts."""
    folder = Path(f"/proc/{process.pid}")
    targets = []
    for fd in (folder / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            targets.append(os.readlink(fd))
    maps = (folder / "maps").read_text().count("/memfd:")
    return sum(target.startswith("/memfd:") for target in targets) + maps


async def _busy(address: str) -> str:
    """What an instance is busy with, or ""."""
    channel = open_channel(address)
    try:
        stub = engine_pb2_grpc.EngineStub(channel)
        with translating(address):
            status = await stub.Status(engine_pb2.StatusRequest(), timeout=2.0)
    finally:
        await channel.close(None)
    load = status.load
    num_held = load.num_kv_blocks - load.num_kv_blocks_free
    is_idle = (load.num_running, load.num_waiting, num_held) == (0, 0, 0)
    if is_idle and status.node_connected:
        return ""
    return f"{status.instance_id}: {load}, node connected: {status.node_connected}"

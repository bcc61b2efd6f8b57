"""A whole cluster of real processes: started, asked, killed role by role, stopped; and Ctrl-C at any moment."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from snowskin.kvstore.errors import BadSetting
from snowskin.tools.cluster.chat import stream_chat
from snowskin.tools.cluster.directory import PREFIX, ClusterDirectory
from snowskin.tools.cluster.errors import ChildFailed, ChildUnknown
from snowskin.tools.cluster.local import MAIN_MODULE, LocalCluster
from snowskin.tools.cluster.up_settings import UpSettings
from tests.support.tiny_model import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MESSAGES = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 8}]
STOP_TIMEOUT_S = 60.0
ROOT = Path(__file__).resolve().parents[2]
TOYS = "tests.support.engine_toy"
CTRL_C_SEED = 20240611
START_S = 3.0  # of a cluster on a quiet machine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def runtime_dir(tmp_path_factory, monkeypatch):
    """A place for sockets that this test alone looks at."""
    place = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    return place


def up_settings(model, **fields) -> UpSettings:
    values = {"http_port": 0, "dram_nbytes": 64 << 20, "kv_memory_nbytes": 32 << 20}
    return UpSettings(model=str(model), **{**values, **fields})


def processes_of(supervisor_pid: int) -> list[psutil.Process]:
    """Every process that was started with this supervisor's pid, whoever its parent is now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--parent-pid" in words and words[words.index("--parent-pid") + 1] == str(
            supervisor_pid
        ):
            found.append(process)
    return found


async def ask(cluster: LocalCluster, *, use_cache: bool = True):
    async with httpx.AsyncClient(
        base_url=f"http://{cluster.http_address}", timeout=60, trust_env=False
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        return await stream_chat(client, model, MESSAGES, max_tokens=20, use_cache=use_cache)


async def kvctl(cluster: LocalCluster, *arguments: str):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "snowskin.tools.kvctl.main", "--json",
        "--conductor", cluster.conductor_address, *arguments, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(out)


async def test_a_cluster_serves_and_every_role_comes_back_after_kill_9(model, runtime_dir):
    async with LocalCluster(up_settings(model)) as cluster:
        (directory,) = runtime_dir.glob(f"{PREFIX}*")
        first = await ask(cluster)
        again = await ask(cluster)
        assert len(first.token_ids) == 20
        assert again.token_ids == first.token_ids
        assert again.num_cached_tokens > 0
        addresses = (cluster.http_address, cluster.conductor_address, cluster.nodes[0].address)

        for name in ("prefill-0", "decode-0", "conductor", "node-0"):
            pid = cluster.processes[name].pid
            cluster.kill(name)
            facts = await cluster.restarted(name)
            assert facts.pid != pid
            await cluster.wait_ready(timeout_s=30)
            assert (await ask(cluster)).token_ids == first.token_ids, f"after {name} was killed"

        assert addresses == (
            cluster.http_address,
            cluster.conductor_address,
            cluster.nodes[0].address,
        )
        assert len(processes_of(os.getpid())) == 4
    assert processes_of(os.getpid()) == []
    assert not directory.exists()


async def test_kvctl_sees_a_cluster_that_serves_until_the_last_engine_of_a_kind_is_given_up(
    model, runtime_dir
):
    async with LocalCluster(up_settings(model, restart=False)) as cluster:
        answer = await ask(cluster)
        await cluster.start_engine("prefill")
        await cluster.wait_ready(timeout_s=30)
        status, (node,), found, nothing = await asyncio.gather(
            kvctl(cluster, "status"),
            kvctl(cluster, "nodes"),
            kvctl(cluster, "match", "--text", f"<|user|>{MESSAGES[0]['content']}</s>"),
            kvctl(cluster, "match", "--text", "never seen " * 10),
        )
        states = {each["instance_id"]: each["state"] for each in status["instances"]}
        assert states == {"prefill-0": "ready", "prefill-1": "ready", "decode-0": "ready"}
        assert status["num_requests_finished"] == 1
        assert node["stat"]["node_id"] == "node-0"
        assert node["stat"]["num_blocks"] >= answer.num_prompt_tokens // 16
        assert found["nodes"][0]["num_blocks"] == found["num_tokens"] // 16 > 0
        assert nothing["nodes"][0]["num_blocks"] == 0
        with pytest.raises(ChildUnknown, match="prefill-1"):
            cluster.kill("prefill-7")

        cluster.kill("prefill-0")
        await cluster.processes["prefill-0"].wait_state("failed")
        assert not cluster.failed.done()
        assert len((await ask(cluster)).token_ids) == 20
        cluster.kill("prefill-1")
        async with asyncio.timeout(30):
            assert "prefill-1 died" in str(await cluster.failed)


async def test_a_missing_model_is_said_before_anything_starts(runtime_dir):
    with pytest.raises(BadSetting, match="does/not/exist"):
        async with LocalCluster(up_settings("does/not/exist")):
            pass
    assert list(runtime_dir.iterdir()) == []


async def test_an_engine_that_cannot_start_fails_the_cluster_and_leaves_nothing(model, runtime_dir):
    with pytest.raises(ChildFailed, match=r"prefill-0 ended before it was ready: exit status 1"):
        async with LocalCluster(up_settings(model), engine_module="does.not.exist"):
            pass
    assert processes_of(os.getpid()) == []
    assert list(runtime_dir.iterdir()) == []


def start_up(model, *, module: str = MAIN_MODULE) -> subprocess.Popen[str]:
    """`snowskin up`; with `TOYS` its engines compute nothing and start at once."""
    return subprocess.Popen(
        [sys.executable, "-m", module, "up", "--model", str(model),
         "--http-port", "0", "--dram-nbytes", "64MiB", "--kv-memory-nbytes", "32MiB"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        cwd=ROOT,
    )  # fmt: skip


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if "Ctrl-C" in line:
            return
    pytest.fail("up ended before it was ready")


def assert_nothing_left(process: subprocess.Popen[str], runtime_dir, moment: str) -> None:
    assert processes_of(process.pid) == [], moment
    assert list(runtime_dir.iterdir()) == [], moment


@pytest.mark.parametrize("index", range(3))
def test_ctrl_c_while_it_starts_leaves_nothing(model, runtime_dir, index):
    after_s = random.Random(CTRL_C_SEED + index).uniform(0.0, START_S)
    moment = f"SIGINT after {after_s:.3f} s (seed {CTRL_C_SEED + index})"
    with start_up(model) as process:
        try:
            process.wait(timeout=after_s)
            pytest.fail(f"up ended by itself before {moment}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.communicate(timeout=STOP_TIMEOUT_S)
        assert_nothing_left(process, runtime_dir, moment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_ready_cluster_ends_it_with_status_0_and_leaves_nothing(
    model, runtime_dir, number
):
    with start_up(model, module=TOYS) as process:
        wait_until_ready(process)
        assert len(processes_of(process.pid)) == 4
        process.send_signal(number)
        process.send_signal(number)
        process.communicate(timeout=STOP_TIMEOUT_S)
        assert process.returncode == 0
        assert_nothing_left(process, runtime_dir, number.name)


def test_a_killed_supervisor_takes_its_children_along_and_the_next_one_sweeps_its_directory(
    model, runtime_dir
):
    with start_up(model, module=TOYS) as process:
        wait_until_ready(process)
        children = processes_of(process.pid)
        process.kill()
        process.communicate(timeout=STOP_TIMEOUT_S)
        _, alive = psutil.wait_procs(children, timeout=STOP_TIMEOUT_S)
        assert alive == []
        assert len(list(runtime_dir.glob(f"{PREFIX}*"))) == 1
    ClusterDirectory().close()  # what the next `up` begins and ends with
    assert list(runtime_dir.iterdir()) == []

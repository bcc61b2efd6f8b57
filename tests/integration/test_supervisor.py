"""Children that are started, watched, started again and stopped: with toy children."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from snowskin.tools.cluster import supervised as supervised_module
from snowskin.tools.cluster.child import Child, describe_exit
from snowskin.tools.cluster.errors import ChildFailed
from snowskin.tools.cluster.restarts import RestartLimits
from snowskin.tools.cluster.supervised import ChildSpec, Supervised
from snowskin.tools.cluster.vital_signs import NUM_LOOKS, until_silent

TOY = Path(__file__).parent.parent / "support" / "toy_child.py"
IMPATIENT = RestartLimits(first_delay_s=0.01, max_delay_s=0.02, max_quick_deaths=4)
TIMEOUT_S = 20.0


def toy_command(*flags: str) -> list[str]:
    return [sys.executable, "-S", "-E", str(TOY), *flags]


def toy_spec(mode: str = "serve", **fields) -> ChildSpec:
    values = {
        "name": "toy-0",
        "role": "toy",
        "command": lambda _previous: toy_command("--mode", mode),
        "start_timeout_s": TIMEOUT_S,
        "limits": IMPATIENT,
    }
    return ChildSpec(**{**values, **fields})


@asynccontextmanager
async def supervised(spec: ChildSpec):
    """A child under supervision, and the failures that it reported."""
    failures: list[Exception] = []
    process = Supervised(spec, on_failure=lambda _process, error: failures.append(error))
    hurry: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        yield process, failures
    finally:
        hurry.set_result(None)
        await process.stop(hurry=hurry)


async def test_a_child_is_ready_with_its_facts_and_drains_on_stop(tmp_path):
    log_path = tmp_path / "toy.log"
    async with supervised(toy_spec(log_path=log_path)) as (process, failures):
        facts = await process.start()
        assert (facts.role, facts.address, facts.pid) == ("toy", "127.0.0.1:1", process.pid)
        await process.stop(hurry=asyncio.get_running_loop().create_future())
        assert process.state == "stopped"
        assert process.pid is None
    assert log_path.read_text().splitlines() == ["toy says: serve", "toy ends by SIGTERM"]
    assert failures == []


async def test_a_killed_child_comes_back_with_a_command_made_from_its_last_facts():
    seen = []

    def command(previous):
        seen.append(previous and previous.address)
        return toy_command("--address", "127.0.0.1:4711")

    async with supervised(toy_spec(command=command)) as (process, _):
        first = await process.start()
        process.send(signal.SIGKILL)
        again = await process.wait_ready(min_starts=2, timeout_s=TIMEOUT_S)
        assert again.pid != first.pid
    assert seen == [None, "127.0.0.1:4711"]


async def test_a_child_that_dies_at_once_is_given_up_after_the_limit():
    async with supervised(toy_spec("die-soon")) as (process, failures):
        await process.start()
        with pytest.raises(ChildFailed):
            await process.wait_ready(min_starts=100, timeout_s=TIMEOUT_S)
        assert process.num_starts == IMPATIENT.max_quick_deaths
        assert process.state == "failed"
    (failure,) = failures
    assert "toy-0 died 4 times in a row, the last time with exit status 4" in str(failure)


async def test_a_child_that_answers_no_more_is_killed_and_comes_back(caplog):
    async with supervised(toy_spec("unwell", hang_s=0.5)) as (process, failures):
        first = await process.start()
        process.send(signal.SIGSTOP)
        again = await process.wait_ready(min_starts=2, timeout_s=TIMEOUT_S)
        assert again.pid != first.pid
        assert not psutil.pid_exists(first.pid)
        assert "child hangs" in caplog.text
        assert "killed by SIGKILL" in caplog.text
    assert failures == []


async def test_a_child_that_answers_is_left_alone_however_unwell_it_is(caplog):
    asked = asyncio.Event()
    num_asked = 0

    def on_line(line):
        nonlocal num_asked
        num_asked += line == "/healthz"
        if num_asked == 2 * NUM_LOOKS:
            asked.set()

    async with supervised(toy_spec("unwell", hang_s=0.5, forward=on_line)) as (process, _):
        await process.start()
        async with asyncio.timeout(TIMEOUT_S):
            await asked.wait()
        assert process.num_starts == 1
    assert "child hangs" not in caplog.text


async def test_nobody_looks_after_a_child_where_that_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(supervised_module, "until_silent", None)
    async with supervised(toy_spec("unwell")) as (process, _):
        await process.start()
        process.send(signal.SIGKILL)
        await process.wait_ready(min_starts=2, timeout_s=TIMEOUT_S)


async def test_a_stop_ends_a_child_that_hangs(caplog):
    async with supervised(toy_spec("unwell", hang_s=600.0, drain_s=0.05)) as (process, _):
        await process.start()
        process.send(signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            await process.stop(hurry=asyncio.get_running_loop().create_future())
        assert process.pid is None


async def test_a_port_where_nobody_listens_is_silent_only_after_the_whole_time():
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with asyncio.timeout(TIMEOUT_S):
        await until_silent("127.0.0.1:1", 0.2)
    assert loop.time() - began_s >= 0.2


async def test_without_restart_the_first_death_is_reported():
    async with supervised(toy_spec(restart=False)) as (process, failures):
        await process.start()
        process.send(signal.SIGKILL)
        with pytest.raises(ChildFailed):
            await process.wait_ready(min_starts=2, timeout_s=TIMEOUT_S)
    assert "killed by SIGKILL" in str(failures[0])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("fail", "ended before it was ready: exit status 3\n    toy says: fail\n    the reason"),
        ("silent", "closed its ready pipe without a word"),
        ("garbage", "closed its ready pipe without a word"),
        ("mute", "said nothing for 1 s"),
    ],
)
async def test_a_child_that_does_not_become_ready_is_named_with_its_last_lines(
    mode, expected, tmp_path
):
    spec = toy_spec(mode, log_path=tmp_path / "log", start_timeout_s=1.0)
    async with supervised(spec) as (process, _):
        with pytest.raises(ChildFailed, match=expected):
            await process.start()


async def test_a_start_that_fails_is_tried_again_where_asked():
    modes = iter(["fail", "serve"])
    spec = toy_spec(command=lambda _previous: toy_command("--mode", next(modes)))
    async with supervised(spec) as (process, _):
        await process.start(num_tries=2)
        assert process.num_starts == 2


async def test_a_command_that_does_not_exist_leaves_nothing_open():
    spec = toy_spec(command=lambda _previous: ["/does/not/exist"])
    async with supervised(spec) as (process, _):
        with pytest.raises(ChildFailed, match="does/not/exist"):
            await process.start()


async def test_a_child_that_ignores_sigterm_is_killed_after_its_drain_time():
    async with supervised(toy_spec("stubborn", drain_s=0.05)) as (process, _):
        await process.start()
        await process.stop(hurry=asyncio.get_running_loop().create_future())
        assert process.pid is None


async def test_hurry_turns_a_drain_that_is_under_way_into_a_kill():
    hurry = asyncio.get_running_loop().create_future()

    def on_line(line):
        if line == "toy ignores SIGTERM":
            hurry.set_result(None)

    spec = toy_spec("stubborn", drain_s=600.0, forward=on_line)
    async with supervised(spec) as (process, _):
        await process.start()
        async with asyncio.timeout(TIMEOUT_S):
            await process.stop(hurry=hurry)
    assert hurry.done()


async def test_a_stopped_child_is_continued_so_that_it_can_drain(tmp_path):
    log_path = tmp_path / "toy.log"
    async with supervised(toy_spec(log_path=log_path, drain_s=600.0)) as (process, _):
        await process.start()
        process.send(signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            await process.stop(hurry=asyncio.get_running_loop().create_future())
    assert "toy ends by SIGTERM" in log_path.read_text()


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 8])
async def test_a_start_that_is_cancelled_at_any_step_can_still_be_stopped(num_steps):
    async with supervised(toy_spec()) as (process, _):
        task = asyncio.create_task(process.start())
        for _step in range(num_steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        pid = process.pid
    assert pid is None or not psutil.pid_exists(pid)


async def test_a_stop_beats_a_restart_that_waits():
    slow = RestartLimits(num_immediate=0, first_delay_s=600.0, max_delay_s=600.0)
    async with supervised(toy_spec(limits=slow)) as (process, _):
        await process.start()
        process.send(signal.SIGKILL)
        async with asyncio.timeout(TIMEOUT_S):
            await process.wait_state("waiting")
            await process.stop(hurry=asyncio.get_running_loop().create_future())
        assert process.num_starts == 1


async def test_lines_are_forwarded_whole_also_the_last_one_without_an_end():
    script = "import os, sys; os.write(1, b'a' * 100_000 + b'\\nlast')"
    lines: list[str] = []
    child = Child(
        "toy-0",
        [sys.executable, "-S", "-E", "-c", script],
        environment=os.environ,
        log_path=None,
        forward=lines.append,
    )
    assert await child.exited == 0
    assert "".join(lines) == "a" * 100_000 + "last"
    assert lines[-1] == "last"
    assert child.tail()[-1] == "last"


async def test_a_grandchild_that_keeps_the_pipe_open_holds_nothing_up():
    script = "import os, time; print('said', flush=True); os.fork() or time.sleep(0.5)"
    lines: list[str] = []
    child = Child(
        "toy-0",
        [sys.executable, "-S", "-E", "-c", script],
        environment=os.environ,
        log_path=None,
        forward=lines.append,
    )
    async with asyncio.timeout(TIMEOUT_S):
        assert await child.exited == 0
    assert lines == ["said"]  # the leak guard sees to the descriptors


def test_children_die_with_a_supervisor_that_is_killed():
    script = f"""
import asyncio, os, sys
sys.path[:0] = []
from snowskin.tools.cluster.supervised import ChildSpec, Supervised
async def main():
    command = [{sys.executable!r}, "-S", "-E", {str(TOY)!r}, "--parent-pid", str(os.getpid())]
    spec = ChildSpec(name="toy-0", role="toy", command=lambda _previous: command)
    facts = await Supervised(spec, on_failure=print).start()
    print(facts.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as supervisor:
        assert supervisor.stdout is not None
        toy = psutil.Process(int(supervisor.stdout.readline()))
        supervisor.kill()
        supervisor.wait()
        psutil.wait_procs([toy], timeout=TIMEOUT_S)
        assert not toy.is_running() or toy.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0, "exit status 0"),
        (-9, "killed by SIGKILL"),
        (-64, "killed by SIGRTMAX"),
        (-99, "signal 99"),
    ],
)
def test_an_exit_status_is_said_in_words(status, expected):
    assert expected in describe_exit(status)

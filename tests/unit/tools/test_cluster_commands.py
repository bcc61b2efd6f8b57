"""The command line of `snowskin`: help, usage, settings; what needs no process."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from itertools import pairwise
from unittest import mock

import pytest
from click.testing import CliRunner

from snowskin.kvstore.errors import BadSetting
from snowskin.tools.cluster import up
from snowskin.tools.cluster.child import Ready
from snowskin.tools.cluster.local import LocalCluster
from snowskin.tools.cluster.main import COMMANDS, cli
from snowskin.tools.cluster.up_settings import UpSettings


@pytest.fixture(autouse=True)
def _own_logging():
    """A command sets the process's logging up; that must not outlive its test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def run(*arguments, **environment):
    return CliRunner().invoke(cli, arguments, env=environment)


def test_help_lists_every_command_without_loading_any():
    script = (
        "import sys; from snowskin.tools.cluster.main import cli;"
        "cli(['--help'], standalone_mode=False);"
        "print([name for name in ('torch', 'grpc', 'uvicorn', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"
    for name in COMMANDS:
        assert f"  {name} " in out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_with_an_example(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "--config" in result.output


def test_no_command_needs_torch_for_its_help():
    script = (
        "import sys; from snowskin.tools.cluster.main import COMMANDS, cli\n"
        "for name in COMMANDS: cli([name, '--help'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)


def test_ctrl_c_during_the_imports_is_not_lost_where_exceptions_are_ignored(tmp_path):
    (tmp_path / "interrupted.py").write_text(
        "import os, signal\n"
        "class Gone:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.getpid()\n"
        "Gone()\n"
        "def up():\n"
        "    raise SystemExit('started all the same')\n"
    )
    script = (
        f"import sys, dataclasses; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from snowskin.tools.cluster.main import COMMANDS, cli\n"
        "COMMANDS['up'] = dataclasses.replace(COMMANDS['up'], module='interrupted', made=True)\n"
        "cli(['up'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert ran.returncode == -signal.SIGINT, ran.stderr


def test_the_version_is_said():
    assert run("--version").output.startswith("snowskin, version ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["upp"], "No such command"),
        (["up", "--nodes", "0"], "nodes is 0"),
        (["up", "--chunk-tokens", "100"], "no multiple of block_size"),
        (["up", "--host", "0.0.0.0"], "--insecure"),
        (["up", "--http-port", "70000"], "http_port is 70000"),
        (["up", "--prefill", "100"], "at most 64"),
        (["up", "--dram-nbytes", "many"], "not a size"),
        (["up", "--model", "does/not/exist"], "does/not/exist"),
        (["demo", "--tokens", "0"], "tokens is 0"),
        (["demo", "--model", "does/not/exist"], "does/not/exist"),
        (["demo", "--prompt-file", "does/not/exist"], "does/not/exist"),
        (["up", "--config", "does/not/exist.toml"], "exist.toml"),
    ],
)
def test_what_cannot_work_is_exit_status_2_and_says_why(arguments, expected):
    result = run(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_up_hands_its_file_on_to_the_roles(tmp_path, monkeypatch):
    path = tmp_path / "snowskin.toml"
    path.write_text('[up]\nmodel = "m"\nprefill = 3\n[node]\nread_lease_s = 5.0\n')
    seen = []

    async def note(settings, config):
        seen.append((settings.model, settings.prefill, settings.nodes, config))
        raise BadSetting("enough")

    monkeypatch.setattr(up, "_serve", note)
    assert run("up", "--config", str(path), "--nodes", "2").exit_code == 2
    assert run("up", SNOWSKIN_MODEL="e", SNOWSKIN_PREFILL="4").exit_code == 2
    assert seen == [("m", 3, 2, path), ("e", 4, 1, None)]


def test_cores_are_shared_out_among_the_engines(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)))
    assert UpSettings(prefill=2, decode=1).threads_per_engine == 2
    assert UpSettings(prefill=9, decode=9).threads_per_engine == 1
    assert UpSettings(threads=5).threads_per_engine == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_work_and_a_second_one_cancels_its_cleaning(number):
    script = f"""
import asyncio, os, sys
from snowskin.tools.cluster.interrupts import Interrupted, run_interruptible
async def work():
    try:
        os.kill(os.getpid(), {number.value})
        await asyncio.sleep(60)
    finally:
        try:
            os.kill(os.getpid(), {number.value})
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            print("hurried")
            raise
try:
    run_interruptible(work())
except Interrupted as error:
    print(error, error.number.value)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert out.splitlines() == ["hurried", f"{number.name} {number.value}"]


def commands_of(tmp_path, **settings):
    """What a cluster of one of each would start, by role."""
    cluster = LocalCluster(UpSettings(model="m", **settings))
    ready = Ready(address="127.0.0.1:1", door="unix:/d")
    with (
        mock.patch.object(LocalCluster, "_path", tmp_path),
        mock.patch.object(LocalCluster, "nodes", (ready,)),
        mock.patch.object(LocalCluster, "conductor_address", "127.0.0.1:2"),
    ):
        specs = [cluster._node(0), cluster._engine("decode")]
        return [list(spec.command(ready)) for spec in specs]


def flags(command, name):
    return [value for flag, value in pairwise(command) if flag == name]


def test_up_passes_on_how_bytes_are_to_travel(tmp_path):
    node, engine = commands_of(
        tmp_path, transport="ucx", ucx_net_devices="mlx5_0:1", ucx_tls="rc", trusted_network=True
    )
    assert flags(node, "--transports") == ["shm", "tcp", "ucx"]
    for command in (node, engine):
        assert flags(command, "--ucx-net-devices") == ["mlx5_0:1"]
        assert flags(command, "--ucx-tls") == ["rc"]
        assert "--trusted-network" in command
    assert flags(engine, "--node") == ["127.0.0.1:1"]
    node, engine = commands_of(tmp_path)
    assert not [word for word in node + engine if "ucx" in word or "trusted" in word]
    assert flags(node, "--transports") == []
    assert flags(engine, "--node") == ["unix:/d"]

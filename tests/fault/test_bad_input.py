"""What a whole cluster says to input that it cannot use, and that nothing of it stays behind.

Each refusal by itself is tested where it is made (tests/integration/test_conductor_http.py, and
test_bad_input.py for the node); here it is the processes: that the word survives the way to the user,
that no bad request moves a block, a lease or a descriptor, and that a command which cannot work ends at
once with one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.engine_bench import prompt_tokens
from tests.support.up_process import SETTLE_S, assert_exact, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

HOST = "127.0.0.1"
EXIT_S = 20.0
COMPLETIONS = "/v1/completions"
TOO_LONG = list(range(32, 112)) * 60
REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("a prompt over the limit", {"prompt": TOO_LONG}, 400, "context_length_exceeded"),
    ("as text", {"prompt": "x" * 5_000}, 400, "context_length_exceeded"),
    ("answer over the limit", {"max_tokens": 4_092}, 400, "context_length_exceeded"),
    ("streamed", {"prompt": TOO_LONG, "stream": True}, 400, "context_length_exceeded"),
    ("cache off", {"prompt": TOO_LONG, "headers": "off"}, 400, "context_length_exceeded"),
    ("an unsupported parameter", {"best_of": 2}, 400, "unsupported_parameter"),
    ("a token that is none", {"prompt": [1, 1 << 31]}, 400, "invalid_value"),
    ("another model", {"model": "gpt"}, 404, "model_not_found"),
]
BODIES: list[tuple[str, bytes, int, str]] = [
    ("no JSON", b'{"model": "random", "prompt": "x', 400, "invalid_json"),
    ("not UTF-8", b"\xff" * 100, 400, "invalid_json"),
    ("deep", b'{"prompt":' + b"[" * 200_000, 400, "invalid_json"),
    ("huge", b" " * (9 << 20), 413, "body_too_large"),
    (
        "a huge prompt",
        json.dumps({"prompt": "a" * (7 << 20)}).encode(),
        400,
        "missing_required_parameter",
    ),
]
RAW = [
    ("half a body", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{"),
    ("half a header", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-"),
    ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20),
    ("a chunk that is none", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
     b"transfer-encoding: chunked\r\n\r\nzz\r\n"),
]  # fmt: skip

MISSING_A_MODEL = ("prefill", "decode", "conductor")
TAKEN = list(itertools.product(("conductor", "prefill"), ("--port", "--http-port")))
BEYOND_LOOPBACK = ("conductor", "prefill", "decode", "up")


async def test_bad_requests_are_refused_by_name_and_leave_nothing(up, before, monolith, seeds):
    async with httpx.AsyncClient(
        base_url=f"http://{up.http_address}", timeout=20.0, trust_env=False
    ) as http:
        for what, fields, status, code in REFUSED:
            body = {"model": up.model.name, "prompt": "hello", "max_tokens": 4, **fields}
            headers = {"x-snowskin-cache": body.pop("headers", "on")}
            response = await http.post(COMPLETIONS, json=body, headers=headers)
            error = response.json()["error"]
            assert error["message"]
            assert (response.status_code, error["code"]) == (status, code), what
        for what, content, status, code in BODIES:
            response = await http.post(COMPLETIONS, content=content)
            found = response.json()["error"]["code"]
            assert (response.status_code, found) == (status, code), what
    for _what, data in RAW:
        await say_and_hang_up(up.http_address, data)
        await say_and_hang_up(up.conductor_address, data)
        await say_and_hang_up(up.node_addresses[0], data)
    await up.settles_at(before, SETTLE_S)
    prompt = prompt_tokens(100, next(seeds))
    assert_exact(monolith, prompt, await up.ask(prompt, 20), 20)


async def say_and_hang_up(address: str, data: bytes) -> None:
    host, _, port = address.rpartition(":")
    _reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        writer.close()
        await writer.wait_closed()


# --- commands that cannot work: those of one process run two side by side


def run(*arguments: str, within_s: float = EXIT_S) -> tuple[int, str]:
    """The exit status and stderr of `snowskin ...`."""
    done = subprocess.run(
        [sys.executable, "-m", "snowskin.tools.cluster.main", *arguments],
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory):
    return str(tmp_path_factory.mktemp("nowhere") / "none")


@pytest.fixture(scope="module")
def taken_port():
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        yield str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def said(model, nowhere, taken_port):
    """Futures that are done: exit status and stderr of each command, by what is wrong with it and the role."""
    own = {"conductor": (), "up": ()}
    node = ("--node", f"unix:{nowhere}/door")
    there = ("--model", str(model))
    commands: dict[tuple[str, ...], tuple[str, ...]] = {}
    for role in MISSING_A_MODEL:
        commands["model", role] = (role, "--model", nowhere, *own.get(role, node))
    for role, flag in TAKEN:
        commands["port", role, flag] = (role, *there, *own.get(role, node), flag, taken_port)
    for role in BEYOND_LOOPBACK:
        commands["host", role] = (role, *there, *own.get(role, node), "--host", "0.0.0.0")
    commands["memory", "decode"] = ("decode", *there, *node, "--kv-memory-nbytes", "900TiB")
    with ThreadPoolExecutor(max_workers=2) as pool:  # each has half of the machine
        return {
            what: pool.submit(run, *each, within_s=2 * EXIT_S) for what, each in commands.items()
        }


def assert_refused(result: tuple[int, str], *words: str) -> None:
    status, stderr = result
    assert status == 2, stderr
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    for word in words:
        assert word in last


@pytest.mark.parametrize("role", MISSING_A_MODEL)
def test_a_missing_model_directory_is_exit_status_2(said, role, nowhere):
    result = said["model", role].result()
    assert_refused(result, f"snowskin {role}: no model directory at {nowhere}")
    assert len(result[1].splitlines()) == 1


@pytest.mark.parametrize(("role", "flag"), TAKEN)
def test_a_port_that_is_taken_is_exit_status_2(said, role, flag, taken_port):
    assert_refused(said["port", role, flag].result(), f"snowskin {role}: ", taken_port)


def test_up_with_a_port_that_is_taken_is_exit_status_2(model, taken_port):
    result = run("up", "--model", str(model), "--http-port", taken_port)
    assert_refused(result, "snowskin conductor: ", taken_port, "is taken")


@pytest.mark.parametrize("role", BEYOND_LOOPBACK)
def test_an_address_beyond_loopback_is_exit_status_2_unless_it_is_allowed(said, role):
    assert_refused(said["host", role].result(), "0.0.0.0", "loopback", "--insecure")


def test_more_memory_than_there_is_is_exit_status_2(said):
    assert_refused(
        said["memory", "decode"].result(), "snowskin decode: kv_memory_nbytes 900TiB", "lower"
    )


def start(*arguments: str) -> tuple[subprocess.Popen[str], dict]:
    """A role that is ready, and what it said of itself."""
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "snowskin.tools.cluster.main", *arguments,
             "--ready-fd", str(writer), "--parent-pid", str(os.getpid())],
            stderr=subprocess.PIPE, text=True, pass_fds=(writer,),
        )  # fmt: skip
    finally:
        os.close(writer)
    with os.fdopen(reader) as ready:
        line = ready.readline()
    assert line, process.communicate(timeout=EXIT_S)[1]
    return process, json.loads(line)


def end(process: subprocess.Popen[str]) -> str:
    """Asks for the end; what it has said."""
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=EXIT_S)[1]
    assert process.returncode == 0, stderr
    return stderr


def test_every_address_is_fine_where_it_is_allowed(tmp_path):
    process, _facts = start(
        "node", "--host", "0.0.0.0", "--insecure", "--dram-nbytes", "1MiB",
        "--door", f"{tmp_path}/door",
    )  # fmt: skip
    end(process)


async def test_an_engine_without_node_and_conductor_waits_for_them_and_says_so(model, tmp_path):
    door = tmp_path / "door"
    with socket.socket() as free:
        free.bind((HOST, 0))
        conductor = f"{HOST}:{free.getsockname()[1]}"  # bound and deaf: it refuses
        process, facts = await asyncio.to_thread(
            start, "prefill", "--model", str(model), "--node", f"unix:{door}",
            "--conductor", conductor, "--kv-memory-nbytes", "16MiB", "--chunk-tokens", "32",
            "--threads", "1",
        )  # fmt: skip
    url = f"http://{facts['http_address']}/healthz"
    node = None
    try:
        async with httpx.AsyncClient(trust_env=False) as http:
            health = await http.get(url)
            assert health.status_code == 503
            assert not health.json()["ok"]
            assert not health.json()["node_connected"]
            assert not health.json()["conductor_connected"]
            node, _ = await asyncio.to_thread(
                start, "node", "--door", str(door), "--dram-nbytes", "1MiB"
            )

            async def finds_its_node():
                return (await http.get(url)).json()["node_connected"]

            await eventually(finds_its_node, 5.0)
            assert (await http.get(url)).status_code == 503  # still no conductor
    finally:
        said = end(process)
        if node is not None:
            end(node)
    for event in ("node unreachable", "conductor unreachable"):
        assert said.count(f'event="{event}"') == 1, said
    assert "starting without a node" in said

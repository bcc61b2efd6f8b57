"""The machine's stand-ins for a network are what they say: two hosts with cables, and the relay."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.support.hosts import ROOT, Host, _names, hosts_or_skip, remove_stale
from tests.support.relay import DOWN, UP, Relay, RelayProcess

PATIENCE_S = 5.0
SILENCE_S = 0.2
ECHO = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.create_server((sys.argv[1], 0), family=family)
print(listener.getsockname()[1], flush=True)
while True:
    connection, _ = listener.accept()
    try:
        while data := connection.recv(1 << 16):
            connection.sendall(data)
    except ConnectionResetError:
        pass
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) as connection:
    for line in sys.stdin:
        connection.settimeout(float(line))
        try:
            connection.sendall(b"ping")
            print(connection.recv(4).decode(), flush=True)
        except TimeoutError:
            print("silence", flush=True)
"""


@contextlib.contextmanager
def python(command, code, *arguments):
    """A Python process with pipes, run by `command`."""
    process = subprocess.Popen(
        command(sys.executable, "-c", code, *map(str, arguments)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdin.close()
        process.stdout.close()


def asked(process, within_s=PATIENCE_S):
    process.stdin.write(f"{within_s}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.fixture(scope="module")
def hosts():
    with hosts_or_skip(num_cables=2) as made:
        yield made


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("silently", [False, True])
def test_a_cut_cable_passes_nothing_and_a_healed_one_passes_what_waited(hosts, version, silently):
    address = hosts.b.address(1, version=version)
    with python(hosts.b.command, ECHO, address) as server:
        port = server.stdout.readline().strip()
        with python(hosts.a.command, ASK, address, port) as client:
            assert asked(client) == "ping"
            hosts.cables[1].cut(silently=silently)
            try:
                assert asked(client, SILENCE_S) == "silence"
            finally:
                hosts.cables[1].heal()
            assert asked(client) == "ping"


def test_a_rate_is_kept():
    nbytes, rate_mbit = 3 << 20, 100
    swallow = ECHO.replace("connection.sendall(data)", "pass").replace("data := ", "")
    send = f"""
import socket, sys, time
began_s = time.monotonic()
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    connection.sendall(bytes({nbytes}))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
print(time.monotonic() - began_s)
"""
    swallow += "\n    connection.close()"
    with hosts_or_skip(rate_mbit=rate_mbit) as shaped:
        address = shaped.b.address()
        with (
            python(shaped.b.command, swallow, address) as server,
            python(shaped.a.command, send, address, server.stdout.readline().strip()) as client,
        ):
            took_s = float(client.stdout.readline())
    assert took_s > 0.8 * nbytes * 8 / (rate_mbit * 1e6)


def test_a_process_in_another_pid_namespace_is_the_first_of_its_own(hosts):
    command = hosts.a.command(sys.executable, "-c", "import os; print(os.getpid())", own_pids=True)
    assert int(subprocess.check_output(command)) == 1


def test_hosts_of_a_killed_process_are_removed_by_the_next(hosts):
    code = (
        "import os; from tests.support.hosts import Hosts; made = Hosts(); made.__enter__(); "
        "print(made.a.name, made.b.name, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    left = set(done.stdout.split())
    assert left <= set(_names())
    assert left <= set(remove_stale())
    assert not left & set(_names())
    assert hosts.a.name in _names(), "those of the living stay"


def test_what_runs_in_a_host_ends_with_it():
    with hosts_or_skip() as short_lived:
        sleeper = subprocess.Popen(short_lived.a.command("sleep", "60"))
        while not Host(name=short_lived.a.name, side=0).pids():
            time.sleep(0.01)
    assert sleeper.wait(PATIENCE_S) == -signal.SIGKILL


@pytest.fixture
def echo():
    """A server in a thread that echoes each connection; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(ConnectionResetError):
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

    thread = threading.Thread(target=serve, name="echo")
    thread.start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(PATIENCE_S)


def connected(relay):
    connection = socket.create_connection(relay.address, PATIENCE_S)
    connection.settimeout(PATIENCE_S)
    return connection


def received(connection, nbytes):
    data = b""
    while len(data) < nbytes and (part := connection.recv(nbytes - len(data))):
        data += part
    return data


def test_the_relay_holds_at_the_byte_and_lets_go(echo):
    with Relay(echo) as relay, connected(relay) as connection:
        relay.command("hold", direction=UP, at=3)
        connection.sendall(b"abcdef")
        relay.wait_held()
        assert received(connection, 3) == b"abc"
        assert relay.passed[UP] == 3
        relay.command("let_go")
        assert received(connection, 3) == b"def"


def test_the_relay_flips_one_bit_and_delays(echo):
    with Relay(echo) as relay, connected(relay) as connection:
        relay.command("flip", direction=DOWN, at=4)
        relay.command("shape", delay_s=0.05)
        began_s = time.monotonic()
        connection.sendall(b"aaaaaa")
        assert received(connection, 6) == b"aaaa`a"
        assert 0.1 <= time.monotonic() - began_s < 2


def test_a_cut_relay_is_silent_and_a_reset_one_is_not(echo):
    with Relay(echo) as relay, connected(relay) as connection:
        relay.command("cut")
        connection.sendall(b"abc")
        connection.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            connection.recv(3)
        relay.command("heal")
        connection.settimeout(PATIENCE_S)
        assert received(connection, 3) == b"abc"
        relay.command("reset")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_the_relay_keeps_a_rate(echo):
    with Relay(echo) as relay, connected(relay) as connection:
        relay.command("shape", bytes_per_s=4e6)
        began_s = time.monotonic()
        connection.sendall(bytes(1 << 20))
        assert len(received(connection, 1 << 20)) == 1 << 20
        assert time.monotonic() - began_s > 0.2


def test_the_relay_ends_when_one_side_does(echo):
    with Relay(echo) as relay, connected(relay) as connection:
        connection.sendall(b"abc")
        connection.shutdown(socket.SHUT_WR)
        assert received(connection, 4) == b"abc"


def test_the_relay_works_in_a_process_of_its_own(echo):
    with RelayProcess(echo) as relay, connected(relay) as connection:
        relay.command("shape", delay_s=0.01)
        connection.sendall(b"abc")
        assert received(connection, 3) == b"abc"
        assert relay.command("heal")["passed"] == {UP: 3, DOWN: 3}


def test_delay_comes_from_netem_or_the_relay(hosts):
    with (
        python(hosts.b.command, ECHO, hosts.b.address()) as server,
        hosts.delayed((hosts.b.address(), int(server.stdout.readline())), 0.03) as (address, by),
        python(hosts.a.command, ASK, *address) as client,
    ):
        print(f"delay by {by}")
        began_s = time.monotonic()
        assert asked(client) == "ping"
        assert time.monotonic() - began_s >= 0.06

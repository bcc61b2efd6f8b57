"""docs/operations.md: every command run as it stands, and its tables held against the code."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest

import snowskin.engines
import snowskin.kvstore
import snowskin.tools
import snowskin.transport
from snowskin.engines.conductor.request import RefusalReason
from snowskin.kvstore.config import explain
from snowskin.tools import healthy
from snowskin.tools.cluster.main import cli as snowskin_cli
from snowskin.tools.cluster.tables import SETTINGS
from snowskin.tools.kvctl.main import cli as kvctl_cli
from snowskin.transport.errors import SnowskinError
from tests.support.tiny_model import make_tiny_model

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
SERVER = re.compile(r"^snowskin (node|conductor|prefill|decode)\b")
STOP = re.compile(r'^kill -TERM "\$(\w+)_PID"$')
LOOKS = re.compile(
    r"^(python|curl|snowskin (doctor|config|--)|kvctl (--|status|nodes|match|blocks|leases ls))"
)
NUM_AT_ONCE = 3
READY_S, STOP_S = 40.0, 20.0
LOOK_S = 0.05
# What a site never meets: errors of the tools that build and measure Snowskin itself.
OF_DEVELOPMENT = ("snowskin.tools.bench.", "snowskin.tools.protos")


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def rows(first_header):
    """Cells of every table whose first column is called so."""
    found, inside = [], False
    for line in PAGE.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            inside = False
        elif cells[0].strip() == first_header:
            inside = True
        elif inside and not line.startswith("| ---"):
            found.append([cell.strip().strip("`") for cell in cells])
    assert found, first_header
    return found


# --- tables


def error_classes():
    for floor in (snowskin.transport, snowskin.kvstore, snowskin.engines, snowskin.tools):
        for module in pkgutil.walk_packages(floor.__path__, f"{floor.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)

    def below(kind):
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    return [
        kind
        for kind in below(SnowskinError)
        if kind.__module__.startswith("snowskin.")  # tests make some of their own
        and not kind.__module__.startswith(OF_DEVELOPMENT)
    ]


def test_every_reason_is_explained_with_its_status_and_none_else():
    told = {reason: status for reason, status, *_ in rows("reason")}
    known = {kind.reason: kind.status for kind in error_classes()}
    assert told == known
    assert len(rows("reason")) == len(told), "a reason is told twice"
    assert all(all(cells) and len(cells) == 4 for cells in rows("reason"))


def test_every_refusal_of_the_conductor_is_explained():
    assert {code for code, *_ in rows("code")} == {str(reason) for reason in RefusalReason}


def test_the_defaults_are_those_of_the_code():
    told = {
        role: {each.name: each for each in explain(SETTINGS[role](), table=role)}
        for role in {role for role, *_ in rows("role")}
    }
    for role, name, default, _why in rows("role"):
        assert str(told[role][name].shown) == default, f"{role} {name}"


# --- commands


class Site:
    """A folder, an address of its own, and the processes that the page's commands start."""

    def __init__(self, place, model):
        pid = os.getpid()
        self.address = f"127.{1 + pid % 250}.{1 + pid // 250 % 250}.99"
        self.place = place
        self.processes = {}
        shutil.copytree(model, place / "models" / "llama")
        (place / "run").mkdir()
        (place / "bin").mkdir()
        programs = {
            "python": "",
            "snowskin": "-m snowskin.tools.cluster.main",
            "kvctl": "-m snowskin.tools.kvctl.main",
        }
        for name, module in programs.items():
            script = place / "bin" / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            script.chmod(0o755)
        (toml,) = blocks("toml")
        (place / "snowskin.toml").write_text(self.here(toml))
        self.environment = {
            **os.environ,
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "SNOWSKIN_HOST": self.address,
            "SNOWSKIN_CONDUCTOR": f"{self.address}:7000",
            "SNOWSKIN_THREADS": "1",
        }

    def here(self, text):
        """The page's address and socket folder, as they are here."""
        return text.replace("127.0.0.1", self.address).replace("/run/snowskin", f"{self.place}/run")

    def run(self, command):
        if found := SERVER.match(command):
            self.start(found[1], command)
        elif found := STOP.match(command):
            self.stop(found[1].lower())
        else:
            self.wait_ready()
            self.call(command)

    def call(self, command):
        missing = [word for word in ("curl", "jq") if word in command and not shutil.which(word)]
        if missing:
            print(f"NO {missing[0].upper()} HERE, so this is not run: {command}")
            return
        ran = subprocess.run(
            ["sh", "-ec", self.here(command)],
            cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=30,
            check=False,
        )  # fmt: skip
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
        assert ran.stdout.strip(), f"{command} says nothing"
        assert '"error"' not in ran.stdout, f"{command}\n{ran.stdout}"

    def start(self, role, command):
        with (self.place / f"{role}.log").open("ab") as log:
            self.processes[role] = subprocess.Popen(
                ["sh", "-ec", f"exec {self.here(command)}"],
                cwd=self.place, env=self.environment, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def stop(self, role):
        process = self.processes.pop(role)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0

    def wait_ready(self):
        """Until all that was started is whole: other processes have no event for us."""
        ports = {"node": 7180, "conductor": 8000, "prefill": 7280, "decode": 7380}
        deadline_s = time.monotonic() + READY_S
        for role, process in self.processes.items():
            while not (answer := healthy.ask(f"http://{self.address}:{ports[role]}/healthz"))[0]:
                log = (self.place / f"{role}.log").read_text()[-2000:]
                assert process.poll() is None, f"{role} ended: {log}"
                assert time.monotonic() < deadline_s, f"{role}: {answer[1]}\n{log}"
                time.sleep(LOOK_S)

    def end(self):
        for role in [*self.processes]:
            process = self.processes.pop(role)
            process.kill()
            process.wait()


@pytest.fixture
def site(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    with tempfile.TemporaryDirectory(prefix="site-") as name:
        site = Site(Path(name), model)
        try:
            yield site
        finally:
            site.end()


def in_turns(commands):
    """The commands in order; neighbours that only look come together."""
    looking = []
    for command in commands:
        if LOOKS.match(command):
            looking.append(command)
            continue
        yield looking
        yield [command]
        looking = []
    yield looking


def test_every_command_of_the_page_does_as_it_stands(site):
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(commands) > 20
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        for together in in_turns(commands):
            list(pool.map(site.run, together))
    assert not site.processes, "the page ends with a stop of everything"


def test_the_commands_that_the_page_names_exist():
    for program, group in {"snowskin": snowskin_cli, "kvctl": kvctl_cli}.items():
        for words in re.findall(rf"`{program} ([a-z][a-z ]*)", PAGE):
            command: click.Command | None = group
            for word in words.split():
                if isinstance(command, click.Group):
                    command = command.get_command(click.Context(command), word)
                    assert command is not None, f"{program} {words}: no {word}"


def test_the_page_shows_commands_only_where_they_are_run():
    fences = re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)
    assert {kind for kind in fences if kind} == {"toml", "sh"}
    assert not re.search(r"^(?: {4}|\t)\S", PAGE, re.MULTILINE), "an indented block is not run"

"""`snowskin config`: what it prints can be read back, what it refuses says the nearest name, and no secret is shown."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  a settings class's fields are looked up at run time

import pytest
from click.testing import CliRunner

from snowskin.kvstore.config import Sourced, read_table, setting
from snowskin.tools.cluster import config_command
from snowskin.tools.cluster.main import cli
from snowskin.tools.cluster.tables import SETTINGS


def run(*arguments, **environment):
    return CliRunner().invoke(cli, ["config", *map(str, arguments)], env=environment)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "snowskin.toml"
        path.write_text(text)
        return path

    return write


def test_each_value_is_printed_with_its_origin(file):
    path = file('[node]\nnode_id = "a"\ndram_nbytes = "2GiB"\n')
    ran = run("print", "node", "--config", path, "--port", "7100", SNOWSKIN_GRACE_S="3")
    lines = [" ".join(line.split()) for line in ran.output.splitlines()]
    assert lines[0] == "[node]"
    assert f'node_id = "a" # file {path} [node]' in lines
    assert f'dram_nbytes = "2GiB" # file {path} [node]' in lines
    assert "port = 7100 # flag --port" in lines
    assert "grace_s = 3.0 # environment SNOWSKIN_GRACE_S" in lines
    assert "read_lease_s = 10.0 # default" in lines


@pytest.mark.parametrize("role", list(SETTINGS))
def test_what_is_printed_is_a_file_that_gives_the_same_settings(role, tmp_path):
    ran = run("print", role)
    assert ran.exit_code == 0
    path = tmp_path / "again.toml"
    path.write_text(ran.output)
    values = read_table(path, SETTINGS[role](), table=role)
    assert set(values) == set(tomllib.loads(ran.output)[role])
    again = run("print", role, "--config", path)
    assert tomllib.loads(again.output) == tomllib.loads(ran.output)


def test_json_names_value_origin_and_help(file):
    answer = json.loads(run("print", "up", "--json", "--nodes", "2").output)
    assert answer["nodes"] == {
        "value": 2,
        "origin": "flag",
        "where": "--nodes",
        "help": answer["nodes"]["help"],
    }
    assert answer["dram_nbytes"]["value"] == "1GiB"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["node", "--dram-nbytes", "1"], "dram_nbytes is 1. give at least 1MiB"),
        (["node", "--host", "0.0.0.0"], "--insecure"),
        (["node", "--drain", "1"], "--drain-s"),
        (["node", "--port", "x"], "not a valid integer"),
        (["conductor"], "model is not set"),
        (["prefill", "--model", "m"], "no node is named"),
        (["noode"], "noode"),
        (["kvctl", "--conductor", "nowhere"], "not host:port"),
    ],
)
def test_what_a_role_would_refuse_is_refused_with_status_2(arguments, says):
    ran = run("check", *arguments)
    assert ran.exit_code == 2
    assert says in ran.stderr


def test_an_unknown_key_is_refused_with_the_nearest_one(file):
    for command in ("check", "print"):
        ran = run(command, "node", "--config", file("[node]\nread_leese_s = 1\n"))
        assert ran.exit_code == 2
        assert "did you mean read_lease_s" in ran.stderr


def test_an_unknown_variable_is_refused_with_the_nearest_one_and_without_its_value():
    ran = run("check", "node", SNOWSKIN_DRAM_NBITES="hunter2")
    assert ran.exit_code == 2
    assert "SNOWSKIN_DRAM_NBITES is unknown. did you mean SNOWSKIN_DRAM_NBYTES" in ran.stderr
    assert "hunter2" not in ran.output + ran.stderr


def test_a_variable_of_another_role_is_no_mistake():
    ran = run("check", "node", SNOWSKIN_CHUNK_TOKENS="64", SNOWSKIN_DRAIN_S="1")
    assert ran.exit_code == 0
    assert "1 of them set" in ran.output
    assert json.loads(run("check", "node", "--json").output) == {
        "role": "node",
        "ok": True,
        "error": "",
    }


def test_a_refusal_is_json_too():
    ran = run("check", "conductor", "--json")
    assert ran.exit_code == 2
    assert json.loads(ran.stdout)["ok"] is False


@dataclass(frozen=True, kw_only=True)
class GuardedSettings:
    password: str = setting("", help="Never shown.", secret=True)
    collector: str = setting("", help="A URL.")
    model: Path | None = setting(None, help="A path.")


def test_a_secret_is_not_printed_in_any_form(monkeypatch):
    monkeypatch.setitem(SETTINGS, "node", lambda: GuardedSettings)
    arguments = ["node", "--password", "hunter2", "--collector", "http://me:hunter2@host"]
    for more in ([], ["--json"]):
        ran = run("print", *arguments, *more)
        assert ran.exit_code == 0
        assert "hunter2" not in ran.output
        assert "host" in ran.output
    assert "password is set, and not shown" in run("print", *arguments).output
    assert tomllib.loads(run("print", *arguments).output)["node"] == {
        "collector": "http://***@host"
    }


def test_a_value_that_is_not_set_stands_in_a_comment():
    told = Sourced(name="model", value=None, origin="default", where="", secret=False, help="")
    assert config_command.toml_line(told).split() == [
        "#",
        "model",
        "is",
        "not",
        "set",
        "#",
        "default",
    ]

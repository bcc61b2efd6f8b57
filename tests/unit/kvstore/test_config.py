"""Settings: who wins, what is refused, and what the refusal says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from snowskin.kvstore.config import (
    MAX_CONFIG_NBYTES,
    check_bind,
    environment_names,
    explain,
    format_nbytes,
    options,
    parse_nbytes,
    read_table,
    setting,
)
from snowskin.kvstore.errors import BadSetting, InsecureAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSettings:
    host: str = setting("127.0.0.1", help="Address.")
    port: int = setting(7000, help="Port.")
    insecure: bool = setting(False, help="Beyond loopback.")
    read_lease_s: float = setting(10.0, help="Seconds.")
    pool_nbytes: int = setting(1 << 30, help="Pool.")
    verify: Literal["always", "never"] = setting("always", help="Checksums.")
    model: Path | None = setting(None, help="Model.")
    peers: tuple[str, ...] = setting((), help="Peers.")

    def __post_init__(self) -> None:
        check_bind(self.host, insecure=self.insecure)
        if self.read_lease_s <= 0:
            raise BadSetting(f"read_lease_s is {self.read_lease_s}", hint="give seconds > 0")


@click.command()
@click.argument("names", nargs=-1)
@options(ExampleSettings, table="node")
@click.option("--verbose", is_flag=True)
def example(settings: ExampleSettings, names: tuple[str, ...], verbose: bool) -> None:
    print(f"{settings!r} names={names} verbose={verbose}")


def run(*args, env=None):
    return CliRunner().invoke(example, [str(arg) for arg in args], env=env)


def shown(**changes):
    return f"{ExampleSettings(**changes)!r} names=() verbose=False\n"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "snowskin.toml"
        path.write_text(text)
        return path

    return write


def test_without_anything_the_defaults_hold():
    assert run().output == shown()


def test_a_flag_beats_environment_beats_file_beats_default(file):
    path = file("[node]\nport = 1\nread_lease_s = 1\npool_nbytes = 1\n")
    env = {"SNOWSKIN_READ_LEASE_S": "2", "SNOWSKIN_POOL_NBYTES": "2"}
    ran = run("--config", path, "--pool-nbytes", "3", env=env)
    assert ran.output == shown(port=1, read_lease_s=2.0, pool_nbytes=3)


def test_the_file_can_be_named_by_the_environment(file):
    assert run(env={"SNOWSKIN_CONFIG": str(file("[node]\nport = 1\n"))}).output == shown(port=1)


def test_every_type_comes_from_a_file(file):
    path = file(
        '[node]\nhost = "::1"\nport = 2\ninsecure = true\nread_lease_s = 3\npool_nbytes = "64MiB"\n'
        'verify = "never"\nmodel = "models/a"\npeers = ["b", "c"]\n'
    )
    assert run("--config", path).output == shown(
        host="::1",
        port=2,
        insecure=True,
        read_lease_s=3.0,
        pool_nbytes=64 << 20,
        verify="never",
        model=Path("models/a"),
        peers=("b", "c"),
    )


def test_every_type_comes_from_flags():
    flags = "--port 2 --insecure --read-lease-s 3 --pool-nbytes 64MiB --verify never --model a"
    assert run(*flags.split(), "--peers", "b", "--peers", "c").output == shown(
        port=2,
        insecure=True,
        read_lease_s=3.0,
        pool_nbytes=64 << 20,
        verify="never",
        model=Path("a"),
        peers=("b", "c"),
    )


def test_other_options_and_arguments_of_the_command_stay():
    assert run("x", "y", "--verbose").output.endswith("names=('x', 'y') verbose=True\n")


def test_a_table_of_another_role_is_left_alone(file):
    assert run("--config", file("[conductor]\nanything = 1\n")).output == shown()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[node]\nread_leese_s = 1\n", "key read_leese_s is unknown. did you mean read_lease_s"),
        ("[nod]\n", "table [nod] is unknown. did you mean node"),
        ("port = 1\n", "table [port] is unknown"),
        ("node = 1\n", "table [node] is unknown"),
        ('[node]\nport = "1"\n', "[node]: port is '1'. give int"),
        ("[node]\nport = true\n", "[node]: port is True. give int"),
        ("[node]\nport = 1.5\n", "[node]: port is 1.5. give int"),
        ("[node]\ninsecure = 1\n", "[node]: insecure is 1. give bool"),
        ("[node]\nhost = 1\n", "[node]: host is 1. give str"),
        ("[node]\nread_lease_s = nan\n", "[node]: read_lease_s is nan. nan is not a finite number"),
        ('[node]\npool_nbytes = "1x"\n', "[node]: pool_nbytes is '1x'. '1x' is not a size"),
        ("[node]\npool_nbytes = -1\n", "[node]: pool_nbytes is -1"),
        ('[node]\nverify = "maybe"\n', "[node]: verify is 'maybe'"),
        ('[node]\npeers = "b"\n', "[node]: peers is 'b'. give a list of str"),
        ("[node]\npeers = [1]\n", "[node]: peers is [1]. give a list of str"),
        ("[node\n", "is not TOML"),
        (f"[node]\nport = {'9' * 5000}\n", "is not TOML"),
        (f"a = {'[' * 100_000}", "is not TOML"),
        ("#" * (MAX_CONFIG_NBYTES + 1), "is larger than"),
    ],
)
def test_a_bad_file_is_refused_with_file_and_key(file, text, says):
    path = file(text)
    with pytest.raises(BadSetting) as refused:
        read_table(path, ExampleSettings, table="node")
    assert str(path) in str(refused.value)
    assert says in str(refused.value)
    ran = run("--config", path)
    assert ran.exit_code == 2
    assert str(path.name) in ran.output


def test_a_missing_file_is_refused(tmp_path):
    ran = run("--config", tmp_path / "none.toml")
    assert ran.exit_code == 2
    assert "No such file" in ran.output


def test_what_the_class_refuses_ends_the_command_with_its_sentence():
    ran = run("--read-lease-s", "0")
    assert ran.exit_code == 2
    assert "read_lease_s is 0.0. give seconds > 0" in ran.output


def test_a_bad_environment_variable_is_named():
    ran = run(env={"SNOWSKIN_READ_LEASE_S": "inf"})
    assert ran.exit_code == 2
    assert "SNOWSKIN_READ_LEASE_S" in ran.output


def test_help_shows_sentence_default_and_environment():
    text = " ".join(run("--help").output.split())
    for part in (
        "--read-lease-s",
        "SNOWSKIN_READ_LEASE_S",
        "default: (1GiB)",
        "[node]",
        "Checksums.",
    ):
        assert part in text


def test_a_field_without_help_is_a_bug():
    @dataclass(frozen=True)
    class Bare:
        port: int = 1

    with pytest.raises(TypeError, match="not declared by setting"):
        options(Bare, table="node")


def test_a_type_without_a_flag_is_a_bug():
    @dataclass(frozen=True)
    class Odd:
        port: complex = setting(None, help="No.")

    with pytest.raises(TypeError, match="have no flag"):
        options(Odd, table="node")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("4096", 4096), ("64MiB", 64 << 20), ("1.5 GB", 1_500_000_000), (" 2 kib ", 2048)],
)
def test_sizes_are_read(text, nbytes):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "-1", "MiB", "1 XB", "1.5", "1e3", "0.3KiB", "9" * 400, "\u0661"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a"):
        parse_nbytes(text)


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 1024, 1536, 64 << 20, 3 << 40, (1 << 30) + 1])
def test_sizes_are_written_exactly(nbytes):
    assert parse_nbytes(format_nbytes(nbytes)) == nbytes


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_permission(host):
    check_bind(host, insecure=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.1", "::ffff:10.0.0.1", "example.org", "localhost.evil"]
)
def test_other_addresses_need_permission(host):
    with pytest.raises(InsecureAddress, match="--insecure"):
        check_bind(host, insecure=False)
    check_bind(host, insecure=True)


# --- who gave a value


@dataclass(frozen=True, kw_only=True)
class GuardedSettings:
    password: str = setting("", help="Never shown.", secret=True)
    collector: str = setting("", help="A URL.")
    mirrors: tuple[str, ...] = setting((), help="URLs.")
    pool_nbytes: int = setting(1 << 30, help="A size.")


def test_each_value_is_told_with_who_gave_it(file, monkeypatch):
    path = file("[node]\nport = 1\nread_lease_s = 1\npool_nbytes = 1\n")
    monkeypatch.setenv("SNOWSKIN_READ_LEASE_S", "2")
    monkeypatch.setenv("SNOWSKIN_POOL_NBYTES", "2")
    arguments = ["--config", str(path), "--pool-nbytes", "64MiB"]
    told = {each.name: each for each in explain(ExampleSettings, table="node", arguments=arguments)}
    assert {name: (each.shown, each.origin, each.where) for name, each in told.items()} == {
        "host": ("127.0.0.1", "default", ""),
        "port": (1, "file", f"{path} [node]"),
        "insecure": (False, "default", ""),
        "read_lease_s": (2.0, "environment", "SNOWSKIN_READ_LEASE_S"),
        "pool_nbytes": ("64MiB", "flag", "--pool-nbytes"),
        "verify": ("always", "default", ""),
        "model": (None, "default", ""),
        "peers": ((), "default", ""),
    }


def test_an_unknown_flag_or_key_is_refused_also_where_one_only_asks(file):
    with pytest.raises(click.UsageError, match="--prot"):
        explain(ExampleSettings, table="node", arguments=["--prot", "1"])
    path = file("[node]\nprot = 1\n")
    with pytest.raises(click.UsageError, match="did you mean port"):
        explain(ExampleSettings, table="node", arguments=["--config", str(path)])


def test_a_secret_and_the_password_of_a_url_are_never_shown(file):
    path = file(
        '[node]\ncollector = "https://me:hunter2@host:1/x"\nmirrors = ["http://hunter2@h"]\n'
    )
    arguments = ["--config", str(path), "--password", "hunter2"]
    told = explain(GuardedSettings, table="node", arguments=arguments)
    assert "hunter2" not in repr(told)
    assert "hunter2" not in str([each.shown for each in told])
    assert [each.shown for each in told[:3]] == [
        "(hidden)",
        "https://***@host:1/x",
        ("http://***@h",),
    ]
    assert told[0].value == "hunter2"
    with pytest.raises(BadSetting) as refused:
        read_table(file("[node]\npassword = 4711\n"), GuardedSettings, table="node")
    assert "4711" not in str(refused.value)


def test_the_environment_has_a_name_for_each_setting():
    assert environment_names(GuardedSettings)[0] == "SNOWSKIN_PASSWORD"

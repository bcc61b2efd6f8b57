"""`tools.protos` on a toy .proto: it generates, and it notices every kind of drift."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from snowskin.tools.protos import ProtosBroken, drift, generate, main

TOY = """
syntax = "proto3";
package toy.v1;
message Ping { uint32 number = 1; }
service Toy { rpc Ask(Ping) returns (Ping); }
"""
MADE = ["toy/v1/toy_pb2.py", "toy/v1/toy_pb2.pyi", "toy/v1/toy_pb2_grpc.py"]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "proto" / "toy" / "v1"
    folder.mkdir(parents=True)
    (folder / "toy.proto").write_text(TOY)
    return tmp_path / "proto"


@pytest.fixture
def generated(root):
    generate(root, root)
    return root


def test_generated_code_lies_beside_its_proto(root):
    assert generate(root, root) == MADE
    assert all((root / name).stat().st_size for name in MADE)


def test_fresh_code_has_no_drift(generated):
    assert drift(generated) == []


def test_a_changed_proto_is_drift_and_says_what_changed(generated):
    proto = generated / "toy/v1/toy.proto"
    proto.write_text(TOY.replace("number = 1", "number = 1; uint32 extra = 2"))
    report = "\n".join(drift(generated))
    assert "stale: toy/v1/toy_pb2.pyi" in report
    assert "+    extra" in report


def test_an_edited_missing_or_left_over_file_is_drift(generated):
    (generated / MADE[0]).write_text("edited")
    (generated / MADE[1]).unlink()
    (generated / "toy/v1/gone_pb2.py").write_text("")
    report = drift(generated)
    assert f"stale: {MADE[0]}" in report
    assert f"missing: {MADE[1]}" in report
    assert "left over, no .proto makes it: toy/v1/gone_pb2.py" in report


def test_a_broken_proto_is_named(root):
    (root / "toy/v1/toy.proto").write_text('syntax = "proto3"; message {')
    with pytest.raises(ProtosBroken, match=r"toy\.proto:1"):
        drift(root)


def test_no_proto_at_all_is_an_error(tmp_path):
    with pytest.raises(ProtosBroken, match=r"no \.proto file"):
        generate(tmp_path, tmp_path)


def test_the_command_checks_without_writing_then_writes(root):
    run = CliRunner().invoke
    stale = run(main, ["--check", "--root", str(root)])
    assert stale.exit_code == 1
    assert "make protos" in stale.output
    assert not (root / MADE[0]).exists()
    assert run(main, ["--root", str(root)]).output.split() == MADE
    fresh = run(main, ["--check", "--root", str(root)])
    assert (fresh.exit_code, fresh.output) == (0, "protos: 1 files, generated code is up to date\n")


def test_generated_modules_can_be_imported(generated, monkeypatch):
    monkeypatch.syspath_prepend(str(generated))
    from toy.v1 import toy_pb2  # type: ignore[import-not-found]  # just made

    assert toy_pb2.Ping(number=7).number == 7
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        del sys.modules[name]

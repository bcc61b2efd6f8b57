"""The recipe for ucx-py: what of its source is replaced, and what is not built."""

from __future__ import annotations

import subprocess

import pytest

from snowskin.tools import ucx_py
from snowskin.tools.ucx_py import UcxPyNotBuilt, build_system, fetch, installed_ucx

PYPROJECT = """\
[build-system]
build-backend = "rapids_build_backend.build"
requires = [
    "rapids-build-backend>=0.3.1",
] # generated

[project]
name = "ucx-py"
"""


def test_build_back_end_becomes_setuptools_against_the_ucx_that_is_here():
    replaced = build_system(PYPROJECT, ucx="libucx-cu12==1.22.0")
    assert "rapids" not in replaced
    assert 'build-backend = "setuptools.build_meta"' in replaced
    assert '"libucx-cu12==1.22.0"' in replaced
    assert replaced.endswith('[project]\nname = "ucx-py"\n')


def test_source_without_a_build_system_is_refused():
    with pytest.raises(UcxPyNotBuilt, match=r"no \[build-system\]"):
        build_system('[project]\nname = "ucx-py"\n', ucx="libucx-cu12==1.22.0")


def test_another_version_is_not_built(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "VERSION").write_text("0.44.0\n")
    for command in (
        ["init", "-q"],
        ["add", "VERSION"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "it"],
    ):
        subprocess.run(["git", *command], cwd=source, check=True)
    with pytest.raises(UcxPyNotBuilt, match=r"is at version 0\.44\.0"):
        fetch(str(source), "", tmp_path / "clone")


def test_without_ucx_the_hint_names_the_extra(monkeypatch):
    monkeypatch.setattr(ucx_py, "UCX_WHEELS", ("no-such-wheel",))
    with pytest.raises(UcxPyNotBuilt, match=r"snowskin\[ucx\]"):
        installed_ucx()

"""The private directory of a local cluster."""

from __future__ import annotations

import stat

import pytest

from snowskin.kvstore.errors import BadSetting
from snowskin.tools.cluster import directory
from snowskin.tools.cluster.directory import PREFIX, ClusterDirectory


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    return place


def test_it_is_private_and_gone_after_close(runtime_dir):
    made = ClusterDirectory()
    (made.path / "node-0.sock").touch()
    assert made.path.parent == runtime_dir
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    made.close()
    made.close()
    assert not made.path.exists()


def test_what_a_killed_owner_left_is_swept_and_a_living_owner_is_left_alone(runtime_dir):
    dead = runtime_dir / f"{PREFIX}dead"
    dead.mkdir()
    (dead / "owner.lock").touch()
    unborn = runtime_dir / f"{PREFIX}unborn"
    unborn.mkdir()
    living = ClusterDirectory()
    other = ClusterDirectory()
    try:
        assert not dead.exists()
        assert unborn.exists()
        assert living.path.exists()
    finally:
        living.close()
        other.close()


def test_a_path_too_long_for_sockets_is_passed_over(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    made = ClusterDirectory()
    try:
        assert not made.path.is_relative_to(deep)
        assert len(str(made.path / directory.LONGEST_NAME)) <= directory.MAX_SOCKET_PATH_NBYTES
    finally:
        made.close()


def test_no_usable_place_is_an_error_that_says_what_to_set(monkeypatch):
    monkeypatch.setattr(directory, "_parents", list)
    with pytest.raises(BadSetting, match="TMPDIR"):
        ClusterDirectory()

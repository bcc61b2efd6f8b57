"""Folders that go with their owner, and those whose owner was killed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile

import pytest

from snowskin.kvstore import owned_folder
from snowskin.kvstore.node import daemon
from snowskin.kvstore.node.daemon import NodeSettings, serve_node
from snowskin.kvstore.owned_folder import LOCK_NAME, UNBORN_S, OwnedFolder, sweep
from tests.support.roles import running

PREFIX = "snowskin-test-"
KILLED = f"""
import os, pathlib, signal
from snowskin.kvstore.owned_folder import OwnedFolder
OwnedFolder(pathlib.Path(os.environ["PLACE"]), {PREFIX!r})
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_owner(place) -> None:
    subprocess.run(
        [sys.executable, "-c", KILLED], env={**os.environ, "PLACE": str(place)}, check=False
    )


def test_it_is_private_and_gone_after_close(tmp_path):
    folder = OwnedFolder(tmp_path, PREFIX)
    (folder.path / "door").touch()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_owner_left_goes_with_the_next_start_and_the_living_stay(tmp_path):
    living = OwnedFolder(tmp_path, PREFIX)
    stranger = tmp_path / "snowskin-other"
    stranger.mkdir()
    killed_owner(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    other = OwnedFolder(tmp_path, PREFIX)
    assert {*tmp_path.iterdir()} == {living.path, stranger, other.path}
    living.close()
    other.close()


def test_a_folder_that_is_being_made_is_left_alone_unless_it_is_old(tmp_path):
    unborn, forgotten = tmp_path / f"{PREFIX}new", tmp_path / f"{PREFIX}old"
    unborn.mkdir()
    forgotten.mkdir()
    long_ago = forgotten.stat().st_mtime - UNBORN_S - 1.0
    os.utime(forgotten, (long_ago, long_ago))
    assert sweep(tmp_path, PREFIX) == 1
    assert unborn.exists()
    assert not forgotten.exists()


def test_a_link_of_that_name_is_not_followed(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / LOCK_NAME).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    assert sweep(tmp_path, PREFIX) == 0
    assert (target / LOCK_NAME).exists()


def test_an_owner_whose_folder_a_sweeper_took_before_it_was_locked_makes_another(
    tmp_path, monkeypatch
):
    real, swept = owned_folder._locked, []

    def swept_first(path):
        fd = real(path)
        assert fd is not None
        if len(swept) < 2:  # as if the sweeper had come between the file and its lock
            swept.append(path)
            os.unlink(path / LOCK_NAME)
            os.rmdir(path)
            os.close(fd)
            return None
        return fd

    monkeypatch.setattr(owned_folder, "_locked", swept_first)
    folder = OwnedFolder(tmp_path, PREFIX)
    assert folder.path.is_dir()
    assert folder.path not in swept
    folder.close()


async def test_a_node_without_a_door_sweeps_what_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / f"{daemon.FOLDER_PREFIX}dead"
    dead.mkdir()
    (dead / LOCK_NAME).touch()
    (dead / "door").touch()
    async with running(serve_node, NodeSettings, dram_nbytes=1 << 20) as role:
        (own,) = tmp_path.iterdir()
        assert role.facts["door"] == f"unix:{own}/door"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        OwnedFolder(tmp_path / "nowhere", PREFIX)

"""Arenas: sealed, counted, and gone when closed."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from snowskin.kvstore.errors import BadSetting, PoolExhausted
from snowskin.kvstore.pool import arena as arena_module
from snowskin.kvstore.pool.arena import Arena, HugePages, available_nbytes
from snowskin.transport.errors import TransportClosed
from snowskin.transport.mapping import ALIGN_NBYTES, map_memfd
from snowskin.transport.pages import page_use

if TYPE_CHECKING:
    from pathlib import Path

PAGE = mmap.PAGESIZE
HUGE = ALIGN_NBYTES


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def num_mappings(name: str) -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum(f"memfd:snowskin-{name}" in line for line in maps)


def test_reader_sees_what_is_written_and_cannot_write() -> None:
    with Arena(3 * PAGE, name="a", tenant="t") as arena:
        arena.buffer[5] = 42
        fd = arena.open_read_only()
        with mmap.mmap(fd, arena.nbytes, prot=mmap.PROT_READ) as mapped:
            assert mapped[5] == 42
        with pytest.raises(PermissionError):
            mmap.mmap(fd, arena.nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
        os.close(fd)


def test_writer_writes_but_cannot_resize_or_unseal() -> None:
    with Arena(PAGE, name="a", tenant="t") as arena:
        fd = arena.open_read_write()
        os.pwrite(fd, b"x", 7)
        assert arena.buffer[7] == ord("x")
        for nbytes in (0, 2 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, nbytes)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(fd)


def test_size_is_whole_pages_that_exist() -> None:
    with Arena(PAGE + 1, name="a", tenant="t") as arena:
        assert arena.nbytes == arena.buffer.nbytes == 2 * PAGE
        fd = arena.open_read_only()
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE
        os.close(fd)


def test_closing_twice_leaves_no_descriptor_and_no_mapping() -> None:
    before = num_descriptors()
    arena = Arena(PAGE, name="closing", tenant="t", populate=True)
    assert arena.populated(5)
    assert num_mappings("closing") == 1
    arena.close()
    arena.close()
    assert (num_descriptors(), num_mappings("closing")) == (before, 0)
    for use in (arena.open_read_only, arena.open_read_write, lambda: arena.buffer):
        with pytest.raises(TransportClosed, match="closing"):
            use()


def test_view_that_outlives_the_arena_stays_readable() -> None:
    arena = Arena(PAGE, name="outlived", tenant="t")
    arena.buffer[:] = 3
    view = arena.buffer[:10]
    arena.close()
    assert view.tolist() == [3] * 10
    del view
    gc.collect()
    assert num_mappings("outlived") == 0


def test_no_memory_is_an_error_that_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = num_descriptors()

    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PoolExhausted, match="refused 4096 bytes"):
        Arena(PAGE, name="a", tenant="t")
    monkeypatch.setattr(arena_module, "available_nbytes", lambda: PAGE)
    with pytest.raises(PoolExhausted, match="8192 bytes wanted, 4096 available"):
        Arena(2 * PAGE, name="a", tenant="t")
    with pytest.raises(BadSetting, match="lower the pool's size"):
        Arena(1 << 60, name="a", tenant="t")
    assert num_descriptors() == before


def test_control_groups_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arena_module, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("9000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert available_nbytes() == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_nbytes() > 4000


def test_empty_arena_is_refused() -> None:
    with pytest.raises(BadSetting, match="0 bytes"):
        Arena(0, name="a", tenant="t")


def test_huge_pages_that_were_demanded_are_there() -> None:
    try:
        arena = Arena(HUGE + 1, name="huge", tenant="t", huge_pages="always")
    except BadSetting as error:
        pytest.skip(f"an old kernel, or no free memory in one piece: {error}")
    with arena:
        arena.buffer[:] = 1
        use = arena.page_use()
        assert use is not None
        assert (arena.nbytes, use.huge_nbytes, use.resident_nbytes) == (2 * HUGE,) * 3
        fd = arena.open_read_only()
        mapping = map_memfd(fd, arena.nbytes, writable=False)
        assert mapping.array().all()
        reader_use = page_use(mapping.address)
        assert reader_use is not None
        assert reader_use.huge_nbytes == 2 * HUGE, "a reader gets them too"
        os.close(fd)
    assert arena.page_use() is None


def test_huge_pages_that_were_demanded_and_cannot_be_had_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = num_descriptors()
    monkeypatch.setattr(arena_module, "free_hugetlb_nbytes", lambda page_nbytes: 0)
    monkeypatch.setattr(arena_module, "collapse", lambda address, nbytes: "Invalid argument")
    with pytest.raises(BadSetting, match=r"Invalid argument.*set 2 aside"):
        Arena(2 * HUGE, name="huge", tenant="t", huge_pages="always")
    assert (num_descriptors(), num_mappings("huge")) == (before, 0)
    with Arena(2 * HUGE, name="huge", tenant="t") as arena:
        use = arena.page_use()
        assert use is not None
        assert use.huge_nbytes == 0
        assert str(use) == f"pages of {PAGE >> 10} KiB"


def test_huge_pages_set_aside_that_another_took_are_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arena_module, "free_hugetlb_nbytes", lambda page_nbytes: 1 << 60)
    with Arena(2 * HUGE, name="huge", tenant="t", huge_pages="auto") as arena:
        arena.buffer[:] = 1


def test_no_huge_pages_where_none_are_wanted() -> None:
    with Arena(2 * HUGE, name="small", tenant="t", huge_pages="never") as arena:
        arena.buffer[:] = 1
        use = arena.page_use()
        assert use is not None
        assert (use.huge_nbytes, use.resident_nbytes) == (0, 2 * HUGE)


def test_pages_are_lent_only_where_it_was_asked_for_and_go_with_the_arena() -> None:
    before = num_descriptors()
    with Arena(HUGE, name="kept", tenant="t") as arena:
        assert arena.lending is None
        assert "never" in arena.why_not_lent
    with Arena(HUGE + PAGE, name="lent", tenant="t", lend_pages="auto") as arena:
        if arena.lending is None:
            pytest.skip(f"this host lends no pages: {arena.why_not_lent}")
        assert arena.lending.unit_nbytes >= HUGE
        assert os.fstat(arena.lending.fd).st_ino
        loan = arena.lending.lend([(0, arena.nbytes)])
        assert loan.ranges == ((0, HUGE),)
    assert arena.lending.fd < 0
    assert num_descriptors() == before
    assert num_mappings("lent") == 0


@pytest.mark.parametrize("huge_pages", ["never", "auto"])
def test_pages_are_lent_by_what_anybody_could_make_of_them(
    huge_pages: HugePages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "why_not_lend", lambda fd, *, unit_nbytes: "")
    monkeypatch.setattr(arena_module, "unit_nbytes", lambda: HUGE)
    with Arena(HUGE, name="a", tenant="t", huge_pages=huge_pages, lend_pages="auto") as arena:
        assert arena.lending is not None
        assert arena.lending.unit_nbytes == HUGE


def test_host_that_must_not_lend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "why_not_lend", lambda fd, *, unit_nbytes: "a GPU")
    with Arena(HUGE, name="a", tenant="t", lend_pages="auto") as arena:
        assert arena.lending is None
        assert arena.why_not_lent == "a GPU"

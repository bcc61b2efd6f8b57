"""The books of what is lent: whole units, in every order, from every thread; and pages that will not go."""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from snowskin.transport import lending as lending_module
from snowskin.transport import lending_probe
from snowskin.transport.host_probe import HostFiles
from snowskin.transport.lending import Lending, Loan, is_resident
from snowskin.transport.lending_probe import try_out, unit_nbytes, why_not_lend
from snowskin.transport.mapping import ALIGN_NBYTES, Mapping
from snowskin.transport.memory import Lendable, region_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = mmap.PAGESIZE
UNIT = 2 * PAGE
NUM_UNITS = 20
NBYTES = NUM_UNITS * UNIT


@contextmanager
def memfd(nbytes: int = NBYTES) -> Iterator[int]:
    """Of whole pages that exist."""
    fd = os.memfd_create("snowskin-lent", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def fd() -> Iterator[int]:
    with memfd() as opened:
        yield opened


@pytest.fixture
def lending(fd: int) -> Iterator[Lending]:
    made = Lending(fd, NBYTES, unit_nbytes=UNIT)
    yield made
    made.close()


@pytest.fixture
def groups_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending_module, "_GROUP_NBYTES", 4 * UNIT)


def nobody(_offset: int, _nbytes: int) -> bool:
    return True


def refuse(offset: int, nbytes: int) -> bool:
    raise AssertionError(f"asked for [{offset}, {offset + nbytes})")


def test_only_whole_units_are_lent(lending: Lending) -> None:
    assert lending.lendable(0, NBYTES) == (0, NBYTES)
    assert lending.lendable(1, 3 * UNIT) == (UNIT, 2 * UNIT)
    assert lending.lendable(UNIT - 1, 2) == (UNIT, 0)
    assert lending.lendable(UNIT + 1, UNIT - 2) == (2 * UNIT, 0)
    loan = lending.lend([(5 * UNIT + 1, 2 * UNIT), (1, 2 * UNIT), (2 * UNIT, UNIT), (3, 9)])
    assert loan.ranges == ((UNIT, 2 * UNIT), (6 * UNIT, UNIT))
    assert loan.nbytes == lending.lent_nbytes == 3 * UNIT


def test_unit_that_is_not_whole_pages_is_refused(fd: int) -> None:
    for nbytes in (0, PAGE - 1, PAGE + 1):
        with pytest.raises(ValueError, match="whole pages"):
            Lending(fd, NBYTES, unit_nbytes=nbytes)


def test_loan_ends_once(lending: Lending) -> None:
    kept = lending.lend([(0, UNIT)])
    loan = lending.lend([(0, 2 * UNIT)])
    lending.settle(loan)
    lending.settle(loan)
    lending.forsake(loan)
    assert (lending.lent_nbytes, lending.forsaken_nbytes) == (UNIT, 0)
    assert lending.reclaim(UNIT, UNIT, refuse)
    assert lending.num_reclaimed == 0
    lending.forsake(kept)
    lending.settle(kept)
    assert (lending.lent_nbytes, lending.forsaken_nbytes) == (0, UNIT)
    assert lending.num_settled == 1


@pytest.mark.usefixtures("groups_of_four")
def test_what_is_forsaken_often_is_kept_once(lending: Lending) -> None:
    lending.close()
    with memfd() as fd:
        lending = Lending(fd, NBYTES, unit_nbytes=UNIT)
        for _ in range(3):
            for first in range(NUM_UNITS - 1):
                lending.forsake(lending.lend([(first * UNIT, 2 * UNIT)]))
        assert lending.forsaken_nbytes == NBYTES
        assert sorted(lending._forsaken) == [0, 1, 2, 3, 4]
        assert lending.reclaim(0, NBYTES, refuse)
        assert (lending.forsaken_nbytes, lending.num_reclaimed) == (0, NUM_UNITS)
        assert not lending._marked
        lending.close()


@pytest.mark.usefixtures("groups_of_four")
def test_a_run_over_groups_is_replaced_and_its_neighbours_are_not(fd: int) -> None:
    lending = Lending(fd, NBYTES, unit_nbytes=UNIT)
    lending.forsake(lending.lend([(2 * UNIT, 7 * UNIT)]))
    os.pwrite(fd, b"\1" * NBYTES, 0)
    assert lending.reclaim(3 * UNIT, 5 * UNIT, refuse)
    assert (lending.num_reclaimed, lending.forsaken_nbytes) == (5, 2 * UNIT)
    assert os.pread(fd, NBYTES, 0) == b"".join(
        bytes([unit not in range(3, 8)]) * UNIT for unit in range(NUM_UNITS)
    )
    lending.close()


def test_what_is_lent_is_replaced_as_if_it_were_forsaken(fd: int, lending: Lending) -> None:
    os.pwrite(fd, b"\1" * UNIT, 0)
    loan = lending.lend([(0, 3 * UNIT)])
    assert lending.reclaim(0, UNIT, refuse)
    assert os.pread(fd, UNIT, 0) == bytes(UNIT)
    # The new page is nobody's: what becomes of the old loan is nothing to it.
    lending.forsake(loan)
    assert lending.forsaken_nbytes == 2 * UNIT
    assert lending.reclaim(0, UNIT, refuse)
    assert lending.num_reclaimed == 1


def test_unit_is_not_replaced_under_its_living_neighbours(fd: int, lending: Lending) -> None:
    os.pwrite(fd, b"\1" * NBYTES, 0)
    lending.forsake(lending.lend([(UNIT, 3 * UNIT)]))
    asked = []

    def alive(offset: int, nbytes: int) -> bool:
        asked.append((offset, nbytes))
        return False

    assert not lending.reclaim(UNIT + 16, UNIT - 16, alive)
    assert not lending.reclaim(2 * UNIT, UNIT + 16, alive)
    assert asked == [(UNIT, 16), (3 * UNIT + 16, UNIT - 16)]
    assert (lending.forsaken_nbytes, lending.num_reclaimed) == (3 * UNIT, 0)
    assert os.pread(fd, NBYTES, 0) == b"\1" * NBYTES
    # A unit with neighbours that is not marked itself is nobody's business.
    assert lending.reclaim(0, 2 * UNIT, alive)
    assert lending.num_reclaimed == 1


def test_unit_whose_neighbours_are_free_goes_as_a_whole(fd: int, lending: Lending) -> None:
    os.pwrite(fd, b"\1" * NBYTES, 0)
    lending.forsake(lending.lend([(UNIT, UNIT)]))
    assert lending.reclaim(UNIT + 100, 200, nobody)
    assert os.pread(fd, UNIT, UNIT) == bytes(UNIT)


def test_pages_exist_when_the_extent_is_given_away(fd: int, lending: Lending) -> None:
    lending.forsake(lending.lend([(0, 4 * UNIT)]))
    before = os.fstat(fd).st_blocks
    assert lending.reclaim(0, 4 * UNIT, refuse)
    assert os.fstat(fd).st_blocks == before


def test_huge_pages_that_are_not_to_be_had_are_small_ones(
    fd: int, lending: Lending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending_module, "collapse", lambda address, nbytes: "no huge page is left")
    lending.forsake(lending.lend([(0, 4 * UNIT)]))
    before = os.fstat(fd).st_blocks
    assert lending.reclaim(0, 4 * UNIT, refuse)
    assert os.fstat(fd).st_blocks == before


def test_page_that_stays_ends_the_lending_and_is_not_given_away(
    lending: Lending, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lending.forsake(lending.lend([(0, UNIT)]))
    monkeypatch.setattr(lending_module, "is_resident", lambda address, nbytes: True)
    assert not lending.reclaim(0, UNIT, refuse)
    assert not lending.reclaim(0, UNIT, refuse)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert lending.is_refused
    assert lending.lend([(UNIT, UNIT)]).ranges == ()
    assert lending.forsaken_nbytes == UNIT
    # The kernel thinks better of it: the page may be used, but trust is gone.
    monkeypatch.undo()
    assert lending.reclaim(0, UNIT, refuse)
    assert lending.forsaken_nbytes == 0
    assert lending.lend([(UNIT, UNIT)]).ranges == ()


def test_somebody_who_touches_a_page_in_between_does_not_end_the_lending(
    lending: Lending, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [True, True, False]
    monkeypatch.setattr(lending_module, "is_resident", lambda address, nbytes: answers.pop(0))
    lending.forsake(lending.lend([(0, UNIT)]))
    assert lending.reclaim(0, UNIT, refuse)
    assert not lending.is_refused


def test_want_of_memory_is_said_and_is_no_refusal(
    lending: Lending, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    lending.forsake(lending.lend([(0, UNIT)]))
    monkeypatch.setattr(os, "posix_fallocate", no_memory)
    assert lending.reclaim(0, UNIT, refuse)
    assert "Cannot allocate memory" in caplog.text
    assert (lending.forsaken_nbytes, lending.num_reclaimed) == (0, 1)


def test_closed_lending_lends_nothing_and_replaces_nothing(fd: int, lending: Lending) -> None:
    lending.forsake(lending.lend([(0, UNIT)]))
    lending.close()
    lending.close()
    assert lending.lend([(0, UNIT)]).ranges == ()
    assert not lending.reclaim(0, UNIT, refuse)
    assert lending.reclaim(UNIT, UNIT, refuse)
    assert os.fstat(fd).st_size == NBYTES  # the caller's descriptor is the caller's


def test_threads_that_lend_and_forsake_leave_right_books(lending: Lending) -> None:
    kept: list[Loan] = []

    def work(number: int) -> None:
        for turn in range(300):
            loan = lending.lend([((number + turn) % 10 * UNIT, 3 * UNIT)])
            if turn == 299:
                kept.append(loan)
            elif turn % 50 == number:
                lending.forsake(loan)
            else:
                lending.settle(loan)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(200):
        assert lending.reclaim((12 + turn % 6) * UNIT, UNIT, refuse)
    for thread in threads:
        thread.join()
    assert lending.lent_nbytes == 4 * 3 * UNIT
    for loan in kept:
        lending.settle(loan)
    assert lending.lent_nbytes == 0
    assert lending._marked == lending._forsaken
    assert not lending._lent
    assert not lending._loans
    assert lending.reclaim(0, NBYTES, refuse)
    assert not lending._marked


def test_mark_is_never_out_of_sight_between_lent_and_forsaken(lending: Lending) -> None:
    """Who gives the bytes away looks without a lock, at any moment."""

    class Watched(dict[int, int]):
        def pop(self, *key: object) -> int:
            raise AssertionError("nothing is marked for a moment")

    loan = lending.lend([(0, UNIT)])
    lending._marked = Watched(lending._marked)
    lending.forsake(loan)
    assert lending._marked == {0: 1}


def test_page_that_is_there_is_seen(fd: int) -> None:
    mapping = Mapping(fd, NBYTES, writable=False)
    os.pwrite(fd, b"x", 3 * PAGE)
    assert is_resident(mapping.address, NBYTES)
    assert is_resident(mapping.address + 3 * PAGE, PAGE)
    assert is_resident(mapping.address + 1, PAGE), "what cannot be learnt is taken for the worse"
    with memfd(PAGE) as other:
        assert not is_resident(Mapping(other, PAGE, writable=False).address, PAGE)


def test_region_knows_of_whom_its_pages_are_lent_until_it_is_closed(lending: Lending) -> None:
    memory = bytearray(NBYTES)
    with region_of(Lendable(memory=memory, lending=lending), writable=False) as region:
        assert region.lending is lending
        assert (region.nbytes, region.writable) == (NBYTES, False)
    assert region.lending is None
    with region_of(memory) as region:
        assert region.lending is None


def test_host_is_tried_out_quickly_and_leaves_nothing() -> None:
    assert try_out(PAGE) == try_out(ALIGN_NBYTES) == ""


def test_kernel_that_keeps_the_page_or_writes_into_it_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(lending_module, "is_resident", lambda address, nbytes: True)
        assert "keeps pages" in try_out(PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(Lending, "reclaim", lambda *arguments: True)  # and no other page
        assert "written to" in try_out(PAGE)
    with monkeypatch.context() as patch:
        patch.delattr(os, "splice")
        patch.setattr(os, "splice", refuse_by_kernel, raising=False)
        assert "cannot be tried" in try_out(PAGE)


def refuse_by_kernel(*arguments: object, **options: object) -> int:
    raise OSError(22, "Invalid argument")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("sys/module/nvidia/version", "GPU"),
        ("dev/nvidiactl", "GPU"),
        ("dev/kfd", "GPU"),
        ("sys/class/infiniband/mlx5_0/node_type", "RDMA"),
        ("dev/infiniband/uverbs0", "RDMA"),
        ("dev/xpmem", "memory"),
    ],
)
def test_nothing_is_lent_where_pages_may_be_pinned(
    fd: int, tmp_path: Path, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending_probe, "_tried", lambda unit_nbytes: "")
    (tmp_path / "sys/class/infiniband").mkdir(parents=True)  # a module, and no device
    files = HostFiles(root=tmp_path)
    assert why_not_lend(fd, unit_nbytes=PAGE, files=files) == ""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    assert what in why_not_lend(fd, unit_nbytes=PAGE, files=files)


def test_pages_that_were_set_aside_are_not_lent(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Status:
        f_bsize = ALIGN_NBYTES

    monkeypatch.setattr(os, "fstatvfs", lambda fd: Status)
    assert "hugetlb" in why_not_lend(fd, unit_nbytes=PAGE, files=HostFiles(root=tmp_path))


def test_unit_is_the_largest_folio_that_anybody_may_make(tmp_path: Path) -> None:
    files = HostFiles(root=tmp_path)
    assert unit_nbytes(files=files) == PAGE, "a kernel without huge pages"
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    (folder / "hpage_pmd_size").write_text("33554432\n")
    assert unit_nbytes(files=files) == 32 << 20
    (folder / "hpage_pmd_size").write_text("65536\n")
    assert unit_nbytes(files=files) == ALIGN_NBYTES

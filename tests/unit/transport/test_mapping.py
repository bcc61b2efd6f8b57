"""Mappings: shared, aligned, without a descriptor of their own, and gone with the last who looks."""

from __future__ import annotations

import fcntl
import gc
import os
import weakref
from typing import TYPE_CHECKING

import pytest

from snowskin.transport.errors import BadDescriptor, TransportError
from snowskin.transport.mapping import ALIGN_NBYTES, Mapping, Mappings, map_memfd
from snowskin.transport.pages import page_use

if TYPE_CHECKING:
    from collections.abc import Iterator

NBYTES = 3 * 4096


def sealed_memfd(nbytes: int) -> int:
    fd = os.memfd_create("snowskin-mapped", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = sealed_memfd(NBYTES)
    yield fd
    os.close(fd)


def mapped_nbytes() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        ranges = [line.split()[0] for line in maps if "snowskin-mapped" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in (r.split("-") for r in ranges))


def test_mapping_lives_as_long_as_anything_made_of_it(memfd: int) -> None:
    mapping = map_memfd(memfd, NBYTES, writable=True)
    array = mapping.array()[7:]
    view = array.data[1:]
    array[1] = 9
    del mapping, array
    gc.collect()
    assert view[0] == 9
    assert mapped_nbytes() == NBYTES
    del view
    gc.collect()
    assert mapped_nbytes() == 0


def test_mapping_holds_no_descriptor(memfd: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    mapping = map_memfd(memfd, NBYTES, writable=False)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not mapping.array().flags.writeable


@pytest.mark.parametrize("nbytes", [ALIGN_NBYTES, 2 * ALIGN_NBYTES + 5000])
def test_large_mapping_is_aligned_and_takes_no_more_room(nbytes: int) -> None:
    fd = sealed_memfd(nbytes)
    with open("/proc/self/maps", encoding="ascii") as maps:
        before = len(maps.readlines())
    mapping = Mapping(fd, nbytes, writable=True)
    os.close(fd)
    assert mapping.address % ALIGN_NBYTES == 0
    assert mapping.array().nbytes == nbytes
    assert mapped_nbytes() == -(-nbytes // 4096) * 4096
    with open("/proc/self/maps", encoding="ascii") as maps:
        assert len(maps.readlines()) == before + 1, "what was reserved around it is given back"
    use = page_use(mapping.address)
    assert use is not None
    assert use.nbytes == mapped_nbytes()
    mapping.array()[-1] = 1


def test_same_file_is_mapped_once_per_kind_of_right(memfd: int) -> None:
    mappings = Mappings()
    again = os.dup(memfd)
    first = mappings.map(memfd, NBYTES, writable=True)
    assert mappings.map(again, NBYTES, writable=True) is first
    reading = mappings.map(again, NBYTES, writable=False)
    assert reading is not first
    assert not reading.array().flags.writeable
    assert (len(mappings), mapped_nbytes()) == (2, 2 * NBYTES)
    os.close(again)
    gone = weakref.ref(first)
    del first, reading
    gc.collect()
    assert gone() is None
    assert (len(mappings), mapped_nbytes()) == (0, 0)


def test_descriptor_for_reading_does_not_open_what_another_mapped_for_writing(memfd: int) -> None:
    mappings = Mappings()
    kept = mappings.map(memfd, NBYTES, writable=True)
    reader = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    try:
        with pytest.raises(TransportError, match="for writing"):
            mappings.map(reader, NBYTES, writable=True)
        with pytest.raises(BadDescriptor, match="were described"):
            mappings.map(memfd, NBYTES - 1, writable=True)
    finally:
        os.close(reader)
    assert kept.nbytes == NBYTES


def test_refused_mapping_leaves_nothing() -> None:
    large = sealed_memfd(ALIGN_NBYTES)
    reader = os.open(f"/proc/self/fd/{large}", os.O_RDONLY)
    os.close(large)
    with open("/proc/self/maps", encoding="ascii") as maps:
        before = len(maps.readlines())
    with pytest.raises(TransportError, match="Permission denied"):
        Mapping(reader, ALIGN_NBYTES, writable=True)
    os.close(reader)
    with open("/proc/self/maps", encoding="ascii") as maps:
        assert len(maps.readlines()) == before

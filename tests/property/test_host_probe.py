"""Reading a host never fails, whatever stands in /sys and /proc."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis.strategies as st
from hypothesis import given, settings

from snowskin.transport.host_probe import HostFiles, boot_id, namespace_id, read_host
from snowskin.transport.topology import NicAddress, Place, distances, ranked_nics, ranked_rdma
from tests.support.fake_sysfs import LINK, laptop, planted, two_sockets

if TYPE_CHECKING:
    from collections.abc import Mapping

TREES = [two_sockets()[0], laptop()[0]]
damage = st.one_of(
    st.none(),  # the file is missing
    st.binary(max_size=40),
    st.sampled_from(
        [b"-1", b"0", b"4294967295", b"9" * 30, b"up", b"\xff\xfe", b"", b"N/A", b"10 x 21"]
    ),
    st.sampled_from(["folder", "loop", "nowhere"]),
)


def damaged(root: Path, files: dict[str, str], damages: Mapping[str, object]) -> None:
    planted(root, files)
    for name, what in damages.items():
        path = root / name.lstrip("/")
        if not path.parent.is_dir() or path.is_dir():
            continue
        path.unlink(missing_ok=True)
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif what == "folder":
            path.mkdir()
        elif what == "loop":
            path.symlink_to(path.name)
        elif what == "nowhere":
            path.symlink_to("../../../../../../../nowhere")


@settings(max_examples=30)
@given(data=st.data())
def test_any_tree_is_read_and_ranked(data: st.DataObject) -> None:
    files = data.draw(st.sampled_from(TREES))
    damages = data.draw(
        st.dictionaries(st.sampled_from(sorted(files)), damage, min_size=1, max_size=8)
    )
    hosts = st.sampled_from(["10.0.0.1", "fd00::1", "rubbish", ""])
    addresses = data.draw(
        st.dictionaries(
            st.sampled_from(["ens1", "lo", "wlp0s20f3", "new0"]),
            st.lists(st.builds(NicAddress, host=hosts, prefix=st.integers(-1, 200)), max_size=2),
            max_size=3,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        damaged(root, files, damages)
        read = HostFiles(root=root)
        facts = read_host(read, addresses=lambda: addresses)
        assert len(boot_id(read)) == 16
        assert namespace_id("pid", read) >= 0
    distances(facts)
    for place in (Place(), *(gpu.place for gpu in facts.gpus)):
        names = [row.nic.name for row in ranked_nics(facts, place)]
        assert len(names) == len(set(names)) <= len(facts.nics)
        ranked_rdma(facts, place)
    assert all(nic.speed_bytes_per_s >= 0 for nic in facts.nics)


def test_undamaged_trees_hold_links_and_files() -> None:
    for files in TREES:
        assert any(content.startswith(LINK) for content in files.values())

"""What is tried at the start of a process, and what is said where it does not work."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from snowskin.transport.addresses import Address
from snowskin.transport.advertisement import AdvertisedAddress, Advertisement
from snowskin.transport.host_probe import HostFiles, read_host
from snowskin.transport.probes import (
    advertise,
    own_identity,
    probe_shm,
    probe_tcp,
    probe_transports,
    probe_ucx,
)
from snowskin.transport.topology import HostFacts
from snowskin.transport.verbs_probe import load_verbs, registered_page
from tests.support.fake_sysfs import planted, two_sockets

if TYPE_CHECKING:
    from pathlib import Path


class FakeVerbs:
    """libibverbs with two devices; remembers what is open, and refuses where told."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.names = [b"mlx5_0", b"mlx5_1"]
        self.devices = (ctypes.c_void_p * 2)(1, 2)
        self.open: list[str] = []

    def ibv_get_device_list(self, count):
        count._obj.value = len(self.names)
        self.open.append("list")
        return ctypes.addressof(self.devices)

    def ibv_free_device_list(self, _):
        self.open.remove("list")

    def ibv_get_device_name(self, device):
        return self.names[device - 1]

    def taken(self, what: str, device: int) -> int:
        if self.refuse == what and device % 10 == 2:
            ctypes.set_errno(errno.EACCES)
            return 0
        self.open.append(what)
        return device

    def ibv_open_device(self, device):
        return self.taken("device", device)

    def ibv_close_device(self, _):
        self.open.remove("device")

    def ibv_alloc_pd(self, context):
        return self.taken("domain", context)

    def ibv_dealloc_pd(self, _):
        self.open.remove("domain")

    def ibv_reg_mr(self, domain, address, nbytes, access):
        assert (bool(address), nbytes, access) == (True, os.sysconf("SC_PAGESIZE"), 1)
        return self.taken("region", domain)

    def ibv_dereg_mr(self, _):
        self.open.remove("region")


@pytest.fixture
def box(tmp_path: Path) -> tuple[HostFacts, HostFiles]:
    files, addresses = two_sockets()
    library = tmp_path / "lib" / "libucp.so.0.0.0"
    files["/lib/libucp.so.0.0.0"] = ""
    files["/lib/ucx/libuct_cuda.so.0"] = ""
    files["/lib/ucx/libuct_ib.so.0"] = ""
    files["/proc/self/maps"] = f"7f0000000000-7f0000001000 r-xp 00000000 08:01 77 {library}"
    files["/proc/self/maps"] = files["/proc/self/maps"].replace(str(tmp_path), "")
    files["/proc/driver/nvidia/gpus/0000:19:00.0/information"] = "Model: NVIDIA"
    read = HostFiles(root=planted(tmp_path, files))
    return read_host(read, addresses=lambda: addresses), read


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        ("device", "it cannot be opened (Permission denied)"),
        ("domain", "no protection domain (Permission denied)"),
        ("region", "one page cannot be registered (Permission denied)"),
    ],
)
def test_device_that_refuses_says_where_and_leaves_nothing_open(refuse: str, said: str) -> None:
    verbs = FakeVerbs(refuse)
    assert registered_page(verbs) == {"mlx5_0": "", "mlx5_1": said}
    assert verbs.open == []


def test_no_verbs_library_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowskin.transport.verbs_probe.LIBRARY", "libnothere.so.1")
    assert load_verbs() is None


def test_ucx_on_a_gpu_server_has_rdma_gpudirect_and_cuda_ipc(
    box: tuple[HostFacts, HostFiles],
) -> None:
    facts, files = box
    verbs = FakeVerbs()
    verbs.names = [b"mlx5_0", b"mlx5_1"]
    probe = probe_ucx(facts, files=files, why_not=lambda: None, verbs=lambda: verbs)
    assert probe.available
    assert probe.kinds == ("rdma:Ethernet", "cuda_ipc", "gpudirect")
    known = dict(probe.facts)
    assert known["mlx5_0:1"] == "registered one page"
    assert known["mlx5_3:1"] == "libibverbs does not list it"
    assert known["GPUs"] == "8 of NVIDIA's"


def test_ucx_claims_no_rdma_where_no_page_could_be_registered(
    box: tuple[HostFacts, HostFiles],
) -> None:
    facts, files = box
    verbs = FakeVerbs("region")
    verbs.names = [b"unrelated", b"mlx5_0"]
    probe = probe_ucx(facts, files=files, why_not=lambda: None, verbs=lambda: verbs)
    assert probe.kinds == ("cuda_ipc",)
    without = probe_ucx(facts, files=files, why_not=lambda: None, verbs=lambda: None)
    assert without.kinds == ("cuda_ipc",)
    assert "libibverbs is not installed" in dict(without.facts)["RDMA ports"]


def test_ucx_claims_no_gpu_way_without_driver_or_module(
    box: tuple[HostFacts, HostFiles], tmp_path: Path
) -> None:
    facts, files = box
    (tmp_path / "lib/ucx/libuct_cuda.so.0").unlink()
    probe = probe_ucx(facts, files=files, why_not=lambda: None, verbs=FakeVerbs)
    assert probe.kinds == ("rdma:Ethernet",)
    (tmp_path / "proc/driver/nvidia/gpus/0000:19:00.0/information").unlink()
    (tmp_path / "proc/driver/nvidia/gpus/0000:19:00.0").rmdir()
    probe = probe_ucx(facts, files=files, why_not=lambda: None, verbs=FakeVerbs)
    assert dict(probe.facts)["CUDA driver"] == "not in this kernel or container"


def test_ucx_built_without_rdma_claims_none(
    box: tuple[HostFacts, HostFiles], tmp_path: Path
) -> None:
    facts, files = box
    (tmp_path / "lib/ucx/libuct_ib.so.0").unlink()
    probe = probe_ucx(facts, files=files, why_not=lambda: None, verbs=FakeVerbs)
    assert probe.kinds == ("cuda_ipc",)
    assert "no module libuct_ib" in dict(probe.facts)["RDMA ports"]


def test_ucx_that_is_missing_says_what_to_install() -> None:
    probe = probe_ucx(HostFacts(), why_not=lambda: "libucp.so.0 is not here")
    assert not probe.available
    assert probe.reason == "libucp.so.0 is not here"
    assert "snowskin[ucx]" in probe.remedy


def test_shm_is_tried_and_works_here() -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    probe = probe_shm(HostFacts())
    assert probe.available, probe.reason
    assert len(os.listdir("/proc/self/fd")) == num_open


@pytest.mark.parametrize(
    ("function", "step"),
    [("memfd_create", "memfd_create"), ("posix_fallocate", "fallocate"), ("open", "opening it")],
)
def test_shm_says_which_step_a_sandbox_forbids(
    monkeypatch: pytest.MonkeyPatch, function: str, step: str
) -> None:
    def forbidden(*_args: object, **_kwargs: object) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(f"os.{function}", forbidden)
    probe = probe_shm(HostFacts())
    assert not probe.available
    assert probe.reason.startswith(step)


def test_shm_is_refused_where_seals_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.fcntl", lambda *_: 0)
    probe = probe_shm(HostFacts())
    assert not probe.available
    assert "can be made smaller" in probe.reason


def test_tcp_binds_where_it_is_to_listen() -> None:
    probe = probe_tcp([Address("127.0.0.1", 0), Address("0.0.0.0", 0)])
    assert probe.available
    assert "every address of this host" in probe.reason
    assert "IPv4" in dict(probe.facts)["families"]
    assert probe_tcp([]).available


def test_tcp_at_an_address_of_another_host_says_so() -> None:
    probe = probe_tcp([Address("127.0.0.1", 0), Address("192.0.2.77", 0)])
    assert not probe.available
    assert probe.reason.startswith("no port can be bound at 192.0.2.77: ")
    assert "ip addr" in probe.remedy


def test_only_the_schemes_that_are_allowed_are_tried() -> None:
    assert list(probe_transports(["tcp", "shm"], HostFacts())) == ["shm", "tcp"]


def test_advertisement_tells_of_what_works_and_of_nothing_else() -> None:
    tried = probe_transports(["loopback", "shm", "tcp", "grpc"], HostFacts())
    tried["shm"] = replace(tried["shm"], available=False)
    where = AdvertisedAddress(address=Address("10.0.0.7", 7200))
    told = advertise(tried, addresses={"tcp": [where]}, extras={"tcp": b"x"})
    assert [scheme.scheme for scheme in told.schemes] == ["tcp"]
    assert told.schemes[0].addresses == (where,)
    assert Advertisement.from_bytes(told.to_bytes()) == told
    assert told.identity.same_process(own_identity())


def test_another_process_of_this_host_is_the_same_host_and_no_same_process() -> None:
    program = (
        "import sys; from snowskin.transport.advertisement import Advertisement;"
        "from snowskin.transport.probes import own_identity;"
        "sys.stdout.buffer.write(Advertisement(identity=own_identity()).to_bytes());"
        "assert 'torch' not in sys.modules"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, timeout=30
    ).stdout
    other = Advertisement.from_bytes(told).identity
    mine = own_identity()
    assert mine.same_host(other)
    assert mine.same_pids(other)
    assert mine.same_network(other)
    assert not mine.same_process(other)

"""The doctor's checks, on faked /proc texts; and the command over them."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from snowskin.tools.cluster.main import cli
from snowskin.tools.doctor import kernel, machine, software
from snowskin.tools.doctor.finding import Host, Verdict, table_of
from snowskin.tools.doctor.main import examine, lines_of
from snowskin.tools.doctor.need import need_of, weights_nbytes

if TYPE_CHECKING:
    from snowskin.kvstore.config import Value

GIB = 1 << 30
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max open files            {files}                20000                files
Max locked memory         {locked}              8388608              bytes
"""
MEMINFO = """MemTotal:       {total} kB
MemAvailable:   {available} kB
SwapTotal:      {swap} kB
CommitLimit:    {limit} kB
Committed_AS:   {promised} kB
"""


@pytest.fixture
def host(tmp_path):
    """Makes a host whose files are given by their absolute paths; "" makes a folder."""

    def make(files):
        for name, text in files.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            if text == "":
                path.mkdir(exist_ok=True)
            else:
                path.write_text(str(text))
        return Host(root=tmp_path)

    return make


def meminfo(*, total=64, available=32, swap=0, limit=64, promised=1):
    values = {"total": total, "available": available, "swap": swap, "limit": limit}
    kib = {name: gib << 20 for name, gib in (values | {"promised": promised}).items()}
    return MEMINFO.format(**kib)


# --- kernel


@pytest.mark.parametrize(
    ("release", "verdict"),
    [("6.1.0-18-amd64", "ok"), ("5.14.0", "ok"), ("5.10.0-x", "warn"), ("4.19", "warn")],
)
def test_an_old_kernel_is_a_warning(host, release, verdict):
    found = kernel.system(host({"/proc/sys/kernel/osrelease": release}))
    assert found.verdict == verdict
    assert release in found.found


def test_no_linux_is_a_failure(host):
    assert kernel.system(host({})).verdict is Verdict.FAIL


def test_a_memfd_that_cannot_be_made_is_a_failure_with_the_kernels_word(host):
    files = {"/proc/sys/vm/memfd_noexec": 2}
    found = kernel.memfd(host(files), lambda: "Permission denied")
    assert found.verdict is Verdict.FAIL
    assert found.found == "Permission denied, vm.memfd_noexec 2"
    assert "memfd_noexec" in found.action


def test_a_memfd_can_be_made_here():
    assert kernel.try_memfd() == ""
    assert kernel.memfd(Host()).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("locked", "devices", "verdict"),
    [
        ("8388608", [], "ok"),
        ("8388608", ["mlx5_0"], "warn"),
        ("unlimited", ["mlx5_0"], "ok"),
        (str(2 * GIB), ["mlx5_0"], "ok"),
    ],
)
def test_locked_memory_matters_where_there_is_rdma(host, locked, devices, verdict):
    files = {"/proc/self/limits": LIMITS.format(files=1024, locked=locked)}
    files |= {f"/sys/class/infiniband/{name}": "" for name in devices}
    found = kernel.locked_memory(host(files), pool_nbytes=GIB)
    assert found.verdict == verdict
    assert bool(found.action) == (verdict == "warn")


@pytest.mark.parametrize(
    ("limit", "verdict"),
    [("unlimited", "ok"), ("4096", "ok"), ("1024", "warn"), ("255", "fail"), (None, "warn")],
)
def test_few_descriptors_are_a_warning_and_very_few_a_failure(host, limit, verdict):
    files = {} if limit is None else {"/proc/self/limits": LIMITS.format(files=limit, locked=0)}
    found = kernel.open_files(host(files))
    assert found.verdict == verdict
    assert bool(found.action) == (verdict != "ok")


@pytest.mark.parametrize(("value", "verdict"), [("4096", "ok"), ("128", "warn"), (None, "warn")])
def test_a_short_backlog_is_a_warning(host, value, verdict):
    files = {} if value is None else {"/proc/sys/net/core/somaxconn": value}
    assert kernel.connection_backlog(host(files)).verdict == verdict


@pytest.mark.parametrize(
    ("received", "sent", "named"),
    [
        ("4096 131072 6291456", "4096 16384 4194304", ()),
        ("4096 131072 33554432", "4096 16384 16777216", ()),
        ("4096 131072 6291455", "4096 16384 4194304", ("tcp_rmem",)),
        ("4096 131072 6291456", "4096 16384 212992", ("tcp_wmem",)),
        (None, "", ("tcp_rmem", "tcp_wmem")),
    ],
)
def test_small_socket_buffers_are_a_warning_that_names_them(host, received, sent, named):
    texts = {"tcp_rmem": received, "tcp_wmem": sent}
    files = {f"/proc/sys/net/ipv4/{name}": text for name, text in texts.items() if text is not None}
    found = kernel.socket_buffers(host(files))
    assert found.verdict == ("warn" if named else "ok")
    assert [name for name in texts if f"net.ipv4.{name} to" in found.action] == list(named)


@pytest.mark.parametrize(
    ("mode", "promised", "verdict"), [(0, 99, "ok"), (1, 99, "ok"), (2, 1, "warn"), (2, 60, "fail")]
)
def test_strict_overcommit_fails_what_it_would_refuse(host, mode, promised, verdict):
    files = {"/proc/sys/vm/overcommit_memory": mode, "/proc/meminfo": meminfo(promised=promised)}
    assert kernel.overcommit(host(files), wanted_nbytes=8 * GIB).verdict == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("always within_size advise [never] deny force", "absent"),
        ("always within_size [advise] never deny force", "ok"),
        ("[always] within_size advise never deny force", "ok"),
        ("[deny]", "absent"),
    ],
)
def test_huge_pages_are_optional(host, text, verdict):
    files = {"/sys/kernel/mm/transparent_hugepage/shmem_enabled": text}
    assert kernel.huge_pages(host(files)).verdict == verdict


@pytest.mark.parametrize(
    ("name", "verdict"), [("tsc", "ok"), ("kvm-clock", "ok"), ("hpet", "warn")]
)
def test_a_clock_source_that_is_slow_to_read_is_a_warning(host, name, verdict):
    files = {"/sys/devices/system/clocksource/clocksource0/current_clocksource": name}
    assert kernel.clock_source(host(files)).verdict == verdict


@pytest.mark.parametrize(
    ("readings", "resolution_s", "verdict"),
    [
        ([0.0, 1e-6, 1e-6, 3e-6], 1e-9, "ok"),
        ([0.0, 2e-6, 1e-6], 1e-9, "fail"),
        ([0.0, 1e-6], 0.01, "warn"),
        ([0.0, 0.2], 1e-9, "warn"),
        ([], 1e-9, "ok"),
    ],
)
def test_a_clock_that_goes_back_fails_and_a_coarse_or_stalled_one_warns(
    readings, resolution_s, verdict
):
    assert kernel.clock(readings, resolution_s=resolution_s).verdict == verdict


def test_a_clock_that_can_be_set_fails():
    found = kernel.clock([0.0, 1.0], resolution_s=1e-9, is_adjustable=True)
    assert found.verdict is Verdict.FAIL


# --- machine


V2 = {"/proc/self/cgroup": "0::/box\n"}
V1 = {"/proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/\n0::/\n"}
NO_V1_LIMIT = 9223372036854771712


@pytest.mark.parametrize(
    ("group", "verdict"),
    [
        ({}, "ok"),
        (V2 | {"/sys/fs/cgroup/box/memory.max": "max"}, "ok"),
        (V2 | {"/sys/fs/cgroup/box/memory.max": 4 * GIB}, "fail"),
        (V2 | {"/sys/fs/cgroup/memory.max": 4 * GIB}, "fail"),  # the limit of a folder above
        (
            V2
            | {
                "/sys/fs/cgroup/box/memory.max": 9 * GIB,
                "/sys/fs/cgroup/box/memory.current": 2 * GIB,
            },
            "fail",
        ),
        (V2 | {"/sys/fs/cgroup/box/memory.max": 8 * GIB + 1}, "warn"),
        (V1 | {"/sys/fs/cgroup/memory/box/memory.limit_in_bytes": 4 * GIB}, "fail"),
        (V1 | {"/sys/fs/cgroup/memory/memory.limit_in_bytes": 4 * GIB}, "fail"),
        (V1 | {"/sys/fs/cgroup/memory/memory.limit_in_bytes": NO_V1_LIMIT}, "ok"),
    ],
)
def test_memory_is_what_the_control_group_leaves(host, group, verdict):
    found = machine.memory(
        host({"/proc/meminfo": meminfo()} | group), wanted_nbytes=8 * GIB, wanted_by="pools 8GiB"
    )
    assert found.verdict == verdict, found
    assert "8.0 GiB wanted (pools 8GiB)" in found.found
    has_limit = bool(group) and not {"max", NO_V1_LIMIT} & set(group.values())
    assert ("control group" in found.found) == has_limit


@pytest.mark.parametrize(("available", "verdict"), [(7, "fail"), (8, "warn"), (9, "ok")])
def test_memory_must_be_there_now(host, available, verdict):
    files = {"/proc/meminfo": meminfo(available=available)}
    assert machine.memory(host(files), wanted_nbytes=8 * GIB, wanted_by="").verdict == verdict


def test_swap_is_a_warning(host):
    files = {"/proc/meminfo": meminfo(swap=2)}
    found = machine.memory(host(files), wanted_nbytes=GIB, wanted_by="")
    assert found.verdict is Verdict.WARN
    assert "swapoff" in found.action


@pytest.mark.parametrize(
    ("files", "num_threads", "verdict"),
    [
        ({}, 4, "ok"),
        ({}, 5, "warn"),
        ({"/sys/fs/cgroup/cpu.max": "200000 100000"}, 2, "ok"),
        ({"/sys/fs/cgroup/cpu.max": "200000 100000"}, 4, "warn"),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, 4, "ok"),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
            "warn",
        ),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, 4, "ok"),
        ({"/sys/fs/cgroup/cpu.max": "nonsense"}, 4, "ok"),
    ],
)
def test_more_threads_than_paid_cores_are_a_warning(host, files, num_threads, verdict):
    assert machine.cores(host(files), num_cores=4, num_threads=num_threads).verdict == verdict


def test_several_memory_nodes_are_a_warning(host):
    assert machine.numa(host({"/sys/devices/system/node/node0": ""})).verdict is Verdict.ABSENT
    two = host({f"/sys/devices/system/node/{name}": "" for name in ("node0", "node1", "has_cpu")})
    assert machine.numa(two).verdict is Verdict.WARN
    assert "2 memory nodes" in machine.numa(two).found


@pytest.mark.parametrize(
    ("files", "verdict"),
    [
        ({}, "absent"),
        ({"/dev/nvidia0": "x", "/dev/nvidiactl": "x", "/proc/driver/nvidia/version": "550"}, "ok"),
        ({"/proc/driver/nvidia/version": "550"}, "warn"),
        ({"/dev/kfd": "x"}, "ok"),
    ],
)
def test_a_gpu_is_seen(host, files, verdict):
    assert machine.gpu(host(files)).verdict == verdict


def test_an_rdma_port_must_be_active(host):
    assert machine.rdma(host({})).verdict is Verdict.ABSENT
    state = "/sys/class/infiniband/mlx5_0/ports/1/state"
    assert machine.rdma(host({state: "1: DOWN"})).verdict is Verdict.WARN
    found = machine.rdma(host({state: "4: ACTIVE"}))
    assert found.verdict is Verdict.OK
    assert "mlx5_0:1 4: ACTIVE" in found.found


def test_shared_memory_by_name_is_not_needed(host):
    assert machine.shared_memory_folder(host({})).verdict is Verdict.ABSENT
    assert machine.shared_memory_folder(host({"/dev/shm": ""})).verdict is Verdict.OK


def test_a_folder_for_sockets_is_needed(tmp_path):
    assert machine.sockets_folder(lambda: None).verdict is Verdict.FAIL
    assert machine.sockets_folder(lambda: tmp_path).verdict is Verdict.OK


def test_disk_is_looked_at_where_the_folder_would_be(tmp_path, monkeypatch):
    def room(free):
        monkeypatch.setattr("shutil.disk_usage", lambda _path: type("", (), {"free": free}))
        return machine.disk(tmp_path / "not" / "there", what="model", meaning="m")

    assert room(2 * GIB).verdict is Verdict.OK
    assert str(tmp_path) in room(2 * GIB).found
    assert room(GIB // 2).verdict is Verdict.WARN
    assert room(1 << 20).verdict is Verdict.FAIL
    monkeypatch.setattr("os.access", lambda _path, _mode: False)
    assert room(2 * GIB).verdict is Verdict.FAIL


RANGE = {"/proc/sys/net/ipv4/ip_local_port_range": "32768\t60999"}


@pytest.mark.parametrize(
    ("port", "trouble", "verdict"),
    [(8000, "", "ok"), (8000, "taken", "fail"), (40000, "", "warn"), (0, "taken", "ok")],
)
def test_ports_must_be_free_and_not_the_kernels_own(host, port, trouble, verdict):
    wanted = [("node's port", "127.0.0.1", port)]
    found = machine.ports(host(RANGE), wanted, lambda _host, _port: trouble)
    assert found.verdict == verdict, found


def test_a_taken_port_is_seen():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert machine.is_free("127.0.0.1", port) == "taken"
    assert machine.is_free("127.0.0.1", port) == ""
    assert machine.is_free("192.0.2.1", port) != ""


# --- software


@pytest.mark.parametrize(
    ("version", "changes", "verdict"),
    [
        ((3, 11, 2), {}, "ok"),
        ((3, 10, 9), {}, "fail"),
        ((3, 12, 0), {"is_64_bit": False}, "fail"),
        ((3, 12, 0), {"is_debug": True}, "warn"),
    ],
)
def test_python_must_be_new_enough(version, changes, verdict):
    assert software.python(version, **changes).verdict == verdict


@pytest.mark.parametrize(
    ("build", "verdict", "says"),
    [
        (None, "warn", "not installed"),
        ("__version__ = '2.9.0+cpu'\ncuda: Optional[str] = None\n", "ok", "2.9.0+cpu, CPU build"),
        ("__version__ = '2.9.0'\ncuda: Optional[str] = '12.8'\n", "ok", "2.9.0, CUDA 12.8"),
        ("", "ok", "of unknown version, CPU build"),
    ],
)
def test_the_build_of_torch_is_told(build, verdict, says):
    found = software.torch(build, has_gpu=False)
    assert (found.verdict, found.found) == (verdict, says)


def test_torch_is_found_here_without_importing_it():
    build = software.torch_build()
    assert build is not None
    assert "cuda" in build


def test_a_library_that_is_missing_or_does_not_fit_is_a_failure():
    assert software.libraries({"grpcio": "1"}, lambda: "").verdict is Verdict.OK
    assert software.libraries({"grpcio": None}, lambda: "").verdict is Verdict.FAIL
    found = software.libraries({"protobuf": "5"}, lambda: "VersionError: gencode 6, runtime 5")
    assert found.verdict is Verdict.FAIL
    assert "gencode 6" in found.found
    assert software.try_stubs() == ""
    assert all(software.installed_versions().values())


@pytest.mark.parametrize(("speed", "verdict"), [(30e9, "ok"), (1e9, "warn"), (0.0, "fail")])
def test_checksums_must_be_about_as_fast_as_memory(speed, verdict):
    found = software.checksums(speed)
    assert found.verdict == verdict
    assert bool(found.action) == (verdict != "ok")


def test_checksums_are_timed_and_compared_here(monkeypatch):
    assert software.checksum_bytes_per_s() > 1e8
    monkeypatch.setattr(software, "crc32c", lambda _block: 1)
    assert software.checksum_bytes_per_s() == 0.0


# --- what is needed


def test_a_whole_cluster_needs_the_sum_of_its_parts(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1000)
    values: dict[str, Value] = {
        "nodes": 2, "dram_nbytes": GIB, "prefill": 1, "decode": 2, "kv_memory_nbytes": 2 * GIB,
        "model": str(tmp_path), "host": "127.0.0.1", "http_port": 8000, "conductor_port": 0,
    }  # fmt: skip
    need = need_of("up", values, num_cores=6)
    assert need.nbytes == 2 * GIB + 6 * GIB + 3000
    assert need.num_threads == 6
    assert need.ports == (
        ("up's http_port", "127.0.0.1", 8000),
        ("up's conductor_port", "127.0.0.1", 0),
    )
    assert need.reason == "pools 2GiB, KV memory 6GiB, weights 3000"


def test_a_role_alone_needs_its_own_part():
    values: dict[str, Value] = {
        "dram_nbytes": GIB,
        "kv_memory_nbytes": GIB,
        "port": 1,
        "http_port": 2,
        "host": "h",
        "data_port": 3,
    }
    assert need_of("node", values, num_cores=4).nbytes == GIB
    assert need_of("decode", values, num_cores=4).num_threads == 4
    assert need_of("conductor", values, num_cores=4).nbytes == 0
    assert need_of("node", values, num_cores=4).ports == (
        ("node's port", "h", 1),
        ("node's http_port", "h", 2),
        ("node's data_port", "h", 3),
    )


def test_weights_kept_in_half_are_twice_as_large_in_float32(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    assert weights_nbytes(str(tmp_path), dtype="float32") == 2000
    assert weights_nbytes(str(tmp_path), dtype="bfloat16") == 1000
    (tmp_path / "config.json").write_text("[")
    assert weights_nbytes(str(tmp_path), dtype="float32") == 1000
    assert weights_nbytes("", dtype="float32") == 0
    assert weights_nbytes(str(tmp_path / "none"), dtype="float32") == 0


def test_numbers_of_a_proc_table_are_bytes():
    assert table_of("A:  2 kB\nB: 3\nC: x\n\nD:\n") == {"A": 2048, "B": 3}
    assert table_of(None) == {}


# --- the command


def run(*arguments, **environment):
    return CliRunner().invoke(cli, ["doctor", *arguments], env=environment)


def test_this_host_is_examined_and_every_finding_says_what_it_means():
    found = examine("node", ["--dram-nbytes", "1MiB"])
    assert len({each.name for each in found}) == len(found) >= 20
    for each in found:
        assert each.meaning, each
        assert each.action or each.verdict not in (Verdict.WARN, Verdict.FAIL), each


def test_what_failed_is_exit_status_1_and_says_what_to_do():
    ran = run("node", "--dram-nbytes", "1000TiB")
    assert ran.exit_code == 1
    (line,) = (line for line in ran.output.splitlines() if line.startswith("fail   memory"))
    assert "1024000.0 GiB wanted" in line
    assert "do: lower --dram-nbytes" in ran.output


def test_json_is_the_same_for_programs():
    ran = run("node", "--json", "--dram-nbytes", "1000TiB")
    assert ran.exit_code == 1
    answer = json.loads(ran.output)
    assert (answer["role"], answer["ok"]) == ("node", False)
    failed = [each["name"] for each in answer["findings"] if each["verdict"] == "fail"]
    assert failed == ["memory"]
    assert set(answer["findings"][0]) == {"name", "verdict", "found", "meaning", "action"}


def test_without_a_role_a_whole_cluster_is_meant():
    answer = json.loads(run("--json", "--nodes", "3", "--dram-nbytes", "2MiB").output)
    assert answer["role"] == "up"
    (memory,) = (each for each in answer["findings"] if each["name"] == "memory")
    assert "pools 6MiB" in memory["found"]


def test_settings_that_a_role_would_refuse_fail_and_unknown_flags_are_usage(tmp_path):
    ran = run("conductor")
    assert ran.exit_code == 1
    assert "model is not set" in ran.output
    assert "SNOWSKIN_DRAM" in run("node", SNOWSKIN_DRAM="1").output
    assert run("node", "--dram", "1").exit_code == 2
    path = tmp_path / "bad.toml"
    path.write_text("[node]\ndram = 1\n")
    assert run("node", "--config", str(path)).exit_code == 2


def test_a_finding_that_is_good_has_nothing_to_do():
    assert len(lines_of(software.checksums(30e9))) == 2
    assert len(lines_of(software.checksums(0.0))) == 3

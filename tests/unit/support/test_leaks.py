"""The leak guard sees each kind of thing that a test can leave behind, and nothing else."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory

import pytest

from tests.support.leaks import leak_guard, settle, take_snapshot


def guarded():
    return leak_guard(grace_s=0.0)


def refused(kind):
    return pytest.raises(AssertionError, match=f"left behind: {kind}")


def test_nothing_left_is_no_failure():
    with guarded():
        left, right = socket.socketpair()
        left.close()
        right.close()


def test_a_socket_is_seen():
    sockets = []
    with refused("descriptor socket"), guarded():
        sockets += socket.socketpair()
    for one in sockets:
        one.close()


def test_a_pipe_is_seen():
    ends = []
    with refused("descriptor pipe"), guarded():
        ends += os.pipe()
    for end in ends:
        os.close(end)


def test_a_memfd_is_seen():
    fds = []
    with refused("descriptor /memfd:pool"), guarded():
        fds.append(os.memfd_create("pool"))
    os.close(fds[0])


def test_memory_mapped_from_a_closed_memfd_is_seen():
    kept = []
    with refused(".*mapping of /memfd:pool"), guarded():
        fd = os.memfd_create("pool")
        os.ftruncate(fd, 4096)
        kept.append(mmap.mmap(fd, 4096))
        os.close(fd)
    for one in kept:
        one.close()


def test_a_thread_is_seen():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="forgotten")
    with refused("thread forgotten"), guarded():
        thread.start()
    stop.set()
    thread.join()


def test_a_name_in_shared_memory_is_seen():
    kept = []
    with refused(".*name /dev/shm/psm_"), guarded():
        kept.append(shared_memory.SharedMemory(create=True, size=16))
    for one in kept:
        one.close()
        one.unlink()


def test_a_child_process_is_seen_running_and_as_a_zombie():
    children = []
    with refused(".*process .*stdin.read"), guarded():
        command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE))
    with refused("process .*never waited for"), guarded():
        children.append(subprocess.Popen(["true"]))
        os.waitid(os.P_PID, children[1].pid, os.WEXITED | os.WNOWAIT)
    children[0].stdin.close()
    for child in children:
        child.wait()


def test_a_task_that_its_loop_had_to_cancel_is_seen():
    async def forget():
        task = asyncio.create_task(asyncio.Event().wait(), name="forgotten")
        await asyncio.sleep(0)
        assert not task.done()

    with refused("task .*forgotten"), guarded():
        asyncio.run(forget())


def test_a_task_that_was_awaited_is_no_leak():
    async def work():
        await asyncio.create_task(asyncio.sleep(0))

    with guarded():
        asyncio.run(work())


def test_garbage_is_collected_before_anything_is_called_a_leak():
    class Pipe:
        def __init__(self):
            self.ends, self.cycle, self.close = os.pipe(), self, os.close

        def __del__(self):
            for end in self.ends:
                self.close(end)

    with guarded():
        Pipe()


def test_what_ends_by_itself_is_waited_for():
    before = take_snapshot()
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="ending")
    thread.start()
    timer = threading.Timer(0.05, gate.set)
    timer.start()
    assert settle(before, grace_s=5.0) == []
    timer.join()
    thread.join()


def test_a_failing_block_keeps_its_own_error():
    ends = []

    def leak_and_fail():
        ends.extend(os.pipe())
        return 1 / 0

    with pytest.raises(ZeroDivisionError), guarded():
        leak_and_fail()
    for end in ends:
        os.close(end)


def test_the_guard_is_cheap():
    began_s = time.perf_counter()
    num_rounds = 20
    for _ in range(num_rounds):
        with guarded():
            pass
    assert (time.perf_counter() - began_s) / num_rounds < 0.02  # 1 ms; the bound is for busy hosts

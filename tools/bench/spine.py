"""What does a pull cost, above moving the bytes at all?

A pull is match + lease + copy with checksums + release. It is measured by the local door, by the data plane and by
gRPC's slow path, against memcpy, and against memcpy + CRC-32C in the same pieces, of the same bytes, in the same
rounds. Its *fixed cost* is what remains of a pull of few bytes once memcpy + checksum of them, measured in the same
round, are taken off.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.checksum import crc32c
from snowskin.kvstore.client.blocking import BlockingStoreClient
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.client.transports import SLOW_PATH, ClientTransports
from snowskin.tools.bench.host import host_facts
from snowskin.tools.bench.report import Goal, Report, Row, make_row, measure
from snowskin.tools.bench.store_process import StoreProcess, store_process
from snowskin.transport.api import PIECE_NBYTES
from snowskin.transport.runs import Run, pieces

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.tools.bench.registry import BenchOptions
    from snowskin.transport.memory import MemoryRegion

QUESTION = "What does a pull (match, lease, copy with checksums, release) cost above moving the bytes at all?"

KIB, MIB = 1 << 10, 1 << 20
GOAL_FIXED_US = 100.0
MAX_JUDGED_KEYS = 64
GOAL_RATIO = 0.85
GOAL_FROM_NBYTES = 256 * MIB
# Short cases are timed in batches within a round, so that a round is not one sample of the scheduler.
BATCH = 200
IDLE_S = 0.002

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Blocks of one namespace that lie in the store, and where they are pulled to."""

    name: str
    namespace: bytes
    keys: KeyColumn
    block_nbytes: int
    source: Bytes
    target: Bytes

    @property
    def nbytes(self) -> int:
        """All of it."""
        return len(self.keys) * self.block_nbytes

    @property
    def offsets(self) -> range:
        """Where each block lies, locally."""
        return range(0, self.nbytes, self.block_nbytes)


def show_size(nbytes: int) -> str:
    """`64 KiB`, `16 MiB`."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def make_load(number: int, num_blocks: int, block_nbytes: int, *, seed: int = 7) -> Load:
    """Random bytes under random keys."""
    generator = np.random.default_rng([seed, number])
    packed = generator.bytes(32 * num_blocks)
    nbytes = num_blocks * block_nbytes
    return Load(
        name=f"{show_size(nbytes)} ({num_blocks} x {show_size(block_nbytes)})",
        namespace=number.to_bytes(32, "little"),
        keys=KeyColumn(packed=packed, width=32),
        block_nbytes=block_nbytes,
        source=np.frombuffer(generator.bytes(nbytes), np.uint8),
        target=np.zeros(nbytes, np.uint8),
    )


def copy(load: Load) -> None:
    """Memcpy of the load's bytes in the local door's pieces: the least that moving them can cost."""
    for start, _, nbytes in pieces([Run(0, 0, load.nbytes)], PIECE_NBYTES):
        end = start + nbytes
        np.copyto(load.target[start:end], load.source[start:end])


def copy_and_check(load: Load) -> None:
    """The same, with the checksum of each block taken right after its piece landed."""
    crc, block_nbytes = 0, load.block_nbytes
    for start, _, nbytes in pieces([Run(0, 0, load.nbytes)], PIECE_NBYTES):
        end = start + nbytes
        np.copyto(load.target[start:end], load.source[start:end])
        if block_nbytes > nbytes:
            crc = crc32c(load.target[start:end], crc)
            continue
        for block in range(start, end, block_nbytes):
            crc32c(load.target[block : block + block_nbytes])


def publish(client: BlockingStoreClient, load: Load) -> None:
    """Puts a load into the store."""
    with client.register(load.source) as local:
        client.publish(
            namespace=load.namespace,
            keys=load.keys,
            block_nbytes=load.block_nbytes,
            local=local,
            local_offsets=load.offsets,
        )


def pulling(client: BlockingStoreClient, load: Load, local: MemoryRegion) -> Callable[[], None]:
    """One pull of all of a load, as a case to measure."""

    def pull() -> None:
        pulled = client.pull(
            namespace=load.namespace,
            keys=load.keys,
            block_nbytes=load.block_nbytes,
            local=local,
            local_offsets=load.offsets,
        )
        assert pulled.num_blocks == len(load.keys), "a benchmark's blocks were evicted"

    return pull


def rate_rows(
    clients: dict[str, BlockingStoreClient], load: Load, options: BenchOptions
) -> list[Row]:
    """GB/s of pulls of one size through each door, against memcpy and memcpy + checksum."""
    repeat = 1 if options.smoke else max(1, min(BATCH, 16 * MIB // load.nbytes))

    def repeated(case: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeat):
                case()

        return run

    cases = {
        "memcpy": repeated(lambda: copy(load)),
        "memcpy + checksum": repeated(lambda: copy_and_check(load)),
    }
    regions = {name: client.register(load.target) for name, client in clients.items()}
    for name, client in clients.items():
        cases[name] = repeated(pulling(client, load, regions[name]))
    seconds = measure(cases, options.runs)
    rates = {
        name: [repeat * load.nbytes / second / 1e9 for second in samples]
        for name, samples in seconds.items()
    }
    rows = []
    for name in clients:
        for reference in ("memcpy + checksum", "memcpy"):
            judged = (
                name == "local door"
                and reference == "memcpy + checksum"
                and load.nbytes >= GOAL_FROM_NBYTES
            )
            rows.append(
                make_row(
                    f"{name}: pull {load.name} against {reference}",
                    rates[name],
                    "GB/s",
                    reference=(reference, rates[reference]),
                    goal=Goal(of="ratio", relation=">=", bound=GOAL_RATIO) if judged else None,
                )
            )
    for region in regions.values():
        region.close()
    return rows


def fixed_rows(client: BlockingStoreClient, load: Load, options: BenchOptions) -> list[Row]:
    """Microseconds of a pull beyond memcpy + checksum: back to back, and after an idle moment."""
    with client.register(load.target) as local:
        pull = pulling(client, load, local)
        for _ in range(BATCH):  # warms both sides up
            pull()
        rows = []
        for idle_s in (0.0, IDLE_S):
            samples: list[float] = []
            for _ in range(2 if options.smoke else max(5, options.runs)):
                samples += _beyond(
                    [_seconds_after(idle_s, pull) for _ in range(_batch(idle_s, options))], load
                )
            rows.append(
                _fixed_row(
                    f"local door, blocking: fixed cost, {load.name}, {_when(idle_s)}",
                    samples,
                    judged=not idle_s and len(load.keys) <= MAX_JUDGED_KEYS,
                )
            )
    return rows


async def asyncio_rows(store: StoreProcess, load: Load, options: BenchOptions) -> list[Row]:
    """The same through the asyncio client."""

    async def pull() -> float:
        began_s = time.perf_counter()
        await client.pull(
            namespace=load.namespace,
            keys=load.keys,
            block_nbytes=load.block_nbytes,
            local=local,
            local_offsets=load.offsets,
        )
        return time.perf_counter() - began_s

    samples: list[float] = []
    async with await StoreClient.connect(store.door, client_name="bench-asyncio") as client:
        with client.register(load.target) as local:
            for _ in range(BATCH):
                await pull()
            for _ in range(2 if options.smoke else max(5, options.runs)):
                samples += _beyond([await pull() for _ in range(_batch(0.0, options))], load)
    return [_fixed_row(f"local door, asyncio: fixed cost, {load.name}, {_when(0.0)}", samples)]


def _batch(idle_s: float, options: BenchOptions) -> int:
    """Pulls of one round; after an idle moment fewer, or the moments would be all of it."""
    return 10 if options.smoke else 20 if idle_s else BATCH


def _when(idle_s: float) -> str:
    return f"after {idle_s * 1000:.0f} ms idle" if idle_s else "back to back"


def _beyond(pulls_s: list[float], load: Load) -> list[float]:
    """What each pull of a round took beyond memcpy + checksum, which are measured right behind them."""
    bare_s = statistics.median(
        _seconds_after(0.0, lambda: copy_and_check(load)) for _ in range(len(pulls_s))
    )
    return [pull_s - bare_s for pull_s in pulls_s]


def _fixed_row(name: str, samples: list[float], *, judged: bool = False) -> Row:
    goal = Goal(of="value", relation="<=", bound=GOAL_FIXED_US) if judged else None
    return make_row(name, [sample * 1e6 for sample in samples], "us", goal=goal)


def _seconds_after(idle_s: float, case: Callable[[], None]) -> float:
    if idle_s:
        time.sleep(idle_s)
    began_s = time.perf_counter()
    case()
    return time.perf_counter() - began_s


def run(options: BenchOptions) -> Report:
    """Measures against a node of its own process."""
    shapes = [(1, 64 * KIB), (4, 256 * KIB), (64, 256 * KIB), (1024, 256 * KIB)]
    small_shapes = [(1, 64 * KIB), (64, KIB), (1024, KIB)]
    if options.smoke:
        shapes, small_shapes = shapes[:2], small_shapes[:2]
    # A client may lease a quarter of a pool: the largest pull must come in one piece, as it does at a real node.
    shapes_nbytes = sum(count * size for count, size in [*shapes, *small_shapes])
    dram_nbytes = 64 * MIB + 4 * shapes_nbytes
    rows: list[Row] = []
    with (
        store_process(dram_nbytes=dram_nbytes) as store,
        BlockingStoreClient.connect(store.door, client_name="bench-door") as door,
        BlockingStoreClient.connect(store.address, client_name="bench-tcp") as remote,
        BlockingStoreClient.connect(
            store.address, client_name="bench-grpc", transports=ClientTransports(SLOW_PATH)
        ) as slow,
    ):
        for number, (num_blocks, block_nbytes) in enumerate(small_shapes):
            load = make_load(100 + number, num_blocks, block_nbytes)
            publish(door, load)
            rows += fixed_rows(door, load, options)
            rows += asyncio.run(asyncio_rows(store, load, options))
        for number, (num_blocks, block_nbytes) in enumerate(shapes):
            load = make_load(number, num_blocks, block_nbytes)
            publish(door, load)
            rows += rate_rows({"local door": door, "tcp": remote, "gRPC": slow}, load, options)
    return Report(bench="spine", host=host_facts(), rows=tuple(rows))

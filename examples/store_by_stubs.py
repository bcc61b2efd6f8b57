"""Publishes two blocks on a node and pulls them back, by nothing but the generated stubs.

Usage: python examples/store_by_stubs.py 127.0.0.1:7100
"""

import os
import struct
import sys

import grpc

from snowskin.v1 import common_pb2, store_pb2, store_pb2_grpc

NBYTES = 4096  # of a block


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def checksum(namespace: bytes, key: bytes, block: bytes) -> bytes:
    """Ties the bytes to their key: CRC-32C XOR the 32-bit words of both names."""
    record = crc32c(block)
    for (word,) in struct.iter_unpack("<I", namespace + key):
        record ^= word
    return struct.pack("<I", record)


def main(address: str) -> None:
    """Reserve, Write, Commit; Match, Read, Release."""
    namespace, keys = b"a layout of this example".ljust(32), [os.urandom(32), os.urandom(32)]
    column = common_pb2.KeyColumn(packed=b"".join(keys), width=32)
    blocks = [os.urandom(NBYTES) for _ in keys]
    records = b"".join(checksum(namespace, *pair) for pair in zip(keys, blocks, strict=True))
    checksums = common_pb2.Checksums(algorithm="CHECKSUM_ALGORITHM_CRC32C_KEYED", packed=records)
    with grpc.insecure_channel(address) as channel:
        store = store_pb2_grpc.StoreStub(channel)
        wanted = store_pb2.ReserveRequest(namespace=namespace, keys=column, block_nbytes=NBYTES)
        lease = store.Reserve(wanted).lease
        ref = common_pb2.LeaseRef(id=lease.id, capability=lease.capability)
        store.Write(iter([store_pb2.WriteRequest(lease=ref, data=b"".join(blocks))]))
        store.Commit(store_pb2.CommitRequest(lease=ref, num_blocks=2, checksums=checksums))
        matched = store.Match(store_pb2.MatchRequest(namespaces=[namespace], keys=column))
        ref = common_pb2.LeaseRef(id=matched.lease.id, capability=matched.lease.capability)
        data = b"".join(chunk.data for chunk in store.Read(store_pb2.ReadRequest(lease=ref)))
        store.Release(store_pb2.ReleaseRequest(leases=[ref]))
    pulled = zip(keys, [data[:NBYTES], data[NBYTES:]], strict=True)
    if b"".join(checksum(namespace, *pair) for pair in pulled) != matched.checksums[0].packed:
        sys.exit("the bytes are not what was committed")
    print(f"published and pulled {matched.num_blocks} blocks, {len(data)} bytes")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])

"""The shape of a whole cluster on one host."""

from __future__ import annotations

import os
from dataclasses import dataclass

from snowskin.kvstore.config import LogLevel, TransportChoice, check_bind, setting
from snowskin.kvstore.errors import BadSetting

MAX_CHILDREN = 64
DEFAULT_CONDUCTOR_PORT = 7000  # where kvctl looks


@dataclass(frozen=True, kw_only=True)
class UpSettings:
    """What `snowskin up` starts. Sizes are per process."""

    model: str = setting("", help="Model directory; without one, a random model is made.")
    nodes: int = setting(1, help="Store nodes; engines are spread over them.")
    prefill: int = setting(1, help="Prefill engines.")
    decode: int = setting(1, help="Decode engines.")
    dram_nbytes: int = setting(1 << 30, help="DRAM pool of each node.")
    kv_memory_nbytes: int = setting(512 << 20, help="KV memory of each engine.")
    block_size: int = setting(16, help="Tokens of a block.")
    chunk_tokens: int = setting(512, help="Tokens of a prefill chunk.")
    threads: int = setting(0, help="Compute threads of each engine; 0: cores / engines.")
    transport: TransportChoice = setting(
        "auto", help="How blocks travel between engines and nodes; that one or none, auto the best."
    )
    ucx_net_devices: str = setting("", help="Interfaces that UCX uses, where it is demanded.")
    ucx_tls: str = setting("", help="Transports of UCX; it chooses itself if empty.")
    trusted_network: bool = setting(
        False, help="Let UCX reach memory one-sidedly over any network; see `snowskin node --help`."
    )
    host: str = setting("127.0.0.1", help="Address that every role listens on.")
    insecure: bool = setting(False, help="Allow an address beyond loopback without credentials.")
    http_port: int = setting(8000, help="Port of the OpenAI-compatible HTTP; 0 takes a free one.")
    conductor_port: int = setting(
        0, help=f"gRPC port of the conductor; 0: {DEFAULT_CONDUCTOR_PORT}, or a free one."
    )
    restart: bool = setting(True, help="Start a role again when it dies.")
    hang_s: float = setting(
        30.0, help="Seconds without an answer at /healthz before a role is killed; 0: never."
    )
    start_timeout_s: float = setting(120.0, help="Seconds that a role may take to be ready.")
    drain_s: float = setting(10.0, help="Seconds that running work gets when it stops.")
    log_level: LogLevel = setting("info", help="Least level that is logged.")
    log_json: bool = setting(False, help="Log JSON lines.")

    def __post_init__(self) -> None:
        """Refuses what cannot work, before anything is started."""
        check_bind(self.host, insecure=self.insecure)
        for name in ("nodes", "prefill", "decode", "block_size", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="give 1 or more")
        for name in ("start_timeout_s", "drain_s"):
            if not getattr(self, name) > 0:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="give seconds > 0")
        if not self.hang_s >= 0:
            raise BadSetting(f"hang_s is {self.hang_s}", hint="give seconds, or 0 for never")
        if self.chunk_tokens % self.block_size:
            raise BadSetting(
                f"chunk_tokens {self.chunk_tokens} is no multiple of block_size {self.block_size}",
                hint="a chunk is published as whole blocks",
            )
        num_children = self.nodes + self.prefill + self.decode
        if num_children > MAX_CHILDREN:
            raise BadSetting(
                f"{num_children} processes on one host", hint=f"at most {MAX_CHILDREN} together"
            )
        if self.threads < 0:
            raise BadSetting(f"threads is {self.threads}", hint="give 0 for cores / engines")
        for name in ("http_port", "conductor_port"):
            if not 0 <= getattr(self, name) <= 65_535:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="give 0 to 65535")

    @property
    def threads_per_engine(self) -> int:
        """Cores shared out among the engines, at least one each."""
        cores = len(os.sched_getaffinity(0))
        return self.threads or max(1, cores // (self.prefill + self.decode))

"""What a role, as it is configured, needs of its host.

Rules kept here: settings are taken as the role would read them, and need not be complete: a role that lacks one still
tells what the others ask for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snowskin.kvstore.config import Value, format_nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping

ROLES = ("up", "node", "conductor", "prefill", "decode")
RANDOM_MODEL_NBYTES = 152_000_000  # what `up` makes where no model is named
HALF_TYPES = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Sizes, ports and threads of one role, or of a whole cluster.

    Attributes:
        num_threads: compute threads of all its engines.
        ports: what each is for, address, port; 0 for any.
    """

    pool_nbytes: int = 0
    kv_nbytes: int = 0
    weights_nbytes: int = 0
    num_threads: int = 0
    ports: tuple[tuple[str, str, int], ...] = ()

    @property
    def nbytes(self) -> int:
        """All memory."""
        return self.pool_nbytes + self.kv_nbytes + self.weights_nbytes

    @property
    def reason(self) -> str:
        """The sum, for a person."""
        parts = (
            ("pools", self.pool_nbytes),
            ("KV memory", self.kv_nbytes),
            ("weights", self.weights_nbytes),
        )
        return ", ".join(f"{what} {format_nbytes(nbytes)}" for what, nbytes in parts if nbytes)


def need_of(role: str, values: Mapping[str, Value], *, num_cores: int) -> Need:
    """What `role` with these settings needs; of a model that is not there, nothing."""

    def number(name: str) -> int:
        value = values.get(name, 0)
        return value if isinstance(value, int) else 0

    def word(name: str) -> str:
        return str(values.get(name) or "")

    names = ("http_port", "conductor_port") if role == "up" else ("port", "http_port")
    ports = tuple((f"{role}'s {name}", word("host"), number(name)) for name in names)
    if role == "node":
        ports += (("node's data_port", word("data_host") or word("host"), number("data_port")),)
    num_nodes = number("nodes") if role == "up" else int(role == "node")
    num_engines = int(role in ("prefill", "decode"))
    threads = number("threads") or num_cores
    if role == "up":
        num_engines = number("prefill") + number("decode")
        threads = number("threads") or max(1, num_cores // max(1, num_engines))
    weights = weights_nbytes(word("model"), dtype=word("dtype") or "float32")
    if role == "up" and not word("model"):
        weights = RANDOM_MODEL_NBYTES
    return Need(
        pool_nbytes=num_nodes * number("dram_nbytes"),
        kv_nbytes=num_engines * number("kv_memory_nbytes"),
        weights_nbytes=num_engines * weights,
        num_threads=num_engines * threads,
        ports=ports,
    )


def weights_nbytes(model: str, *, dtype: str) -> int:
    """Bytes of a model's weights in memory: as in its files, or twice that where they are widened."""
    if not model:
        return 0
    nbytes = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        kept = config.get("dtype", config.get("torch_dtype", ""))
    except (OSError, ValueError, AttributeError):
        kept = ""
    return nbytes * (2 if dtype == "float32" and kept in HALF_TYPES else 1)

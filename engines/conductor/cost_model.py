"""Seconds to the first token on an instance.

The whole rule: TTFT = transfer + queue + prefill, where

    transfer = over the pulls: a fixed cost + bytes / rate              (0 where nothing is cached)
    queue    = prompt tokens ahead of us                 / prefill rate
    prefill  = prompt tokens that are not cached         / prefill rate

A pull from a node of the same host is as fast as one from the own node, one from another host goes
by gRPC; of the pulls from other nodes as many are made, in order, as bring the first token sooner.

Rules kept here: pure arithmetic over what instances report; rates that an instance has not measured
yet are the defaults below. The prefill rate is an average, so attention's quadratic share is in it
only as far as recent prompts were as long as this one: for a far longer one the estimate is too
small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.engines.conductor.request import Estimate, Request

if TYPE_CHECKING:
    from snowskin.engines.conductor.view import InstanceView
    from snowskin.kvstore.directory.presence import PlannedPull


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Estimates; the fields are what is assumed of an instance that has not measured itself.

    Attributes:
        prefill_tokens_per_s: a 40 M parameter model on one CPU core; an engine's warm-up
            replaces it at once.
        pull_bytes_per_s: one memcpy with a checksum on one core.
        remote_pull_bytes_per_s: from another host, by Read; never more than the measured rate.
        pull_fixed_s: match, lease and release of one pull.
    """

    prefill_tokens_per_s: float = 1_000.0
    pull_bytes_per_s: float = 1e9
    remote_pull_bytes_per_s: float = 3e8
    pull_fixed_s: float = 0.001

    def pulls(self, request: Request, instance: InstanceView) -> tuple[PlannedPull, ...]:
        """What prefill would pull from whom, were it placed on `instance` now.

        What its own node has from the first block on is pulled always. Behind it the pulls that
        together save the most time are made: one that does not pay may lead to one that does.
        """
        own = instance.node_address
        planned = request.presence.pulls(own=own, limit=request.num_usable_blocks)
        num_made, saved_s, most_saved_s = 0, 0.0, 0.0
        tokens_per_s = self._tokens_per_s(instance)
        for num_pulls, pull in enumerate(planned, 1):
            num_tokens = pull.num_blocks * request.shape.block_size
            saved_s += num_tokens / tokens_per_s - self._pull_s(request, instance, pull)
            if saved_s > most_saved_s or (num_pulls == 1 and pull.address == own):
                num_made, most_saved_s = num_pulls, saved_s
        return tuple(planned[:num_made])

    def num_cached_blocks(self, request: Request, instance: InstanceView) -> int:
        """Blocks that prefill would pull."""
        return sum(pull.num_blocks for pull in self.pulls(request, instance))

    def estimate(self, request: Request, instance: InstanceView) -> Estimate:
        """Seconds to the first token, were the request's prefill placed on `instance` now."""
        tokens_per_s = self._tokens_per_s(instance)
        pulls = self.pulls(request, instance)
        num_cached_blocks = sum(pull.num_blocks for pull in pulls)
        num_new_tokens = request.num_tokens - num_cached_blocks * request.shape.block_size
        return Estimate(
            transfer_s=sum(self._pull_s(request, instance, pull) for pull in pulls),
            queue_s=instance.num_waiting_tokens / tokens_per_s,
            prefill_s=num_new_tokens / tokens_per_s,
        )

    def _tokens_per_s(self, instance: InstanceView) -> float:
        return instance.load.prefill_tokens_per_s or self.prefill_tokens_per_s

    def _pull_s(self, request: Request, instance: InstanceView, pull: PlannedPull) -> float:
        bytes_per_s = instance.load.pull_bytes_per_s or self.pull_bytes_per_s
        if _host(pull.address) != _host(instance.node_address):
            bytes_per_s = min(bytes_per_s, self.remote_pull_bytes_per_s)
        # Another node is asked after the own one, which is asked in any case.
        fixed_s = self.pull_fixed_s * (1 if pull.address == instance.node_address else 2)
        return fixed_s + pull.num_blocks * request.shape.block_nbytes / bytes_per_s


def _host(address: str) -> str:
    return address.rpartition(":")[0]

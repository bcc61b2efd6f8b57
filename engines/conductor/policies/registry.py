"""Policies by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.engines.conductor.policies.least_ttft import LeastTtft
from snowskin.engines.conductor.policies.round_robin import RoundRobin
from snowskin.kvstore.errors import BadSetting

if TYPE_CHECKING:
    from snowskin.engines.conductor.admission import AdmissionLimits
    from snowskin.engines.conductor.cost_model import CostModel
    from snowskin.engines.conductor.policies.api import Policy

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (LeastTtft, RoundRobin)}


def make_policy(
    name: str, cost_model: CostModel | None = None, limits: AdmissionLimits | None = None
) -> Policy:
    """The policy of that name.

    Raises:
        BadSetting: no policy has this name; the known ones are listed.
    """
    if name not in POLICIES:
        raise BadSetting(
            f"policy {name!r} is unknown", hint=f"known: {', '.join(sorted(POLICIES))}"
        )
    return POLICIES[name](cost_model, limits)

"""From logits to a token, with no state but a seed and a position.

Rules kept here: greedy (temperature 0) takes the largest logit, of equal ones the lowest id.
Otherwise one number u in [0, 1) is drawn from SHA-256(seed, position), and the token is read off
the inverse of the cumulative distribution over the `top_k` likeliest tokens (Fan et al. 2018) and,
of these, the nucleus (Holtzman et al. 2020, section 3.1), tokens by falling probability, of equal
ones the lowest id first, all in float64. So a sequence can
move to another process with two integers, and repeats there token for token.
"""

# ruff: noqa: N803, N806  (tensors carry their shapes, V the vocabulary)

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from snowskin.engines.errors import BadSamplingParams, LogitsNotFinite

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

_DOMAIN = b"snowskin.sampler.v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it, at most 100.
        top_p: share of probability that the nucleus holds, in (0, 1].
        top_k: likeliest tokens that the nucleus is taken from; 0 is all.
        seed: 0 to 2**64 - 1.
        max_tokens: tokens to generate at most, at least 1.
        stop_token_ids: tokens that end the sequence; the model's own are among them only if the
            caller names them.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what cannot be sampled.

        Raises:
            BadSamplingParams: a field is out of its range; the message names it.
        """
        # `not (a <= x)` also refuses NaN.
        if not 0.0 <= self.temperature <= 100.0:
            raise BadSamplingParams(
                f"temperature is {self.temperature}", hint="use 0 (greedy) up to 100"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise BadSamplingParams(f"top_p is {self.top_p}", hint="use more than 0, at most 1")
        if self.top_k < 0:
            raise BadSamplingParams(f"top_k is {self.top_k}", hint="use 1 or more, or 0 for all")
        if not 0 <= self.seed < 2**64:
            raise BadSamplingParams(f"seed is {self.seed}", hint="use 0 to 2**64 - 1")
        if self.max_tokens < 1:
            raise BadSamplingParams(f"max_tokens is {self.max_tokens}", hint="use at least 1")
        if any(token < 0 for token in self.stop_token_ids):
            raise BadSamplingParams(
                f"stop_token_ids {self.stop_token_ids} hold a negative one", hint="use token ids"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """A token, and how near it was to being another one.

    Attributes:
        token_id: the token.
        top_two_margin: largest minus second largest logit; infinite where there is one token only.
        edge_distance: how far rounding must move the distribution for another token, the smallest
            of: distance of u from the nearer edge of the token's interval; of the nucleus' mass
            from `top_p`; of the token's probability from that of the one before it and the one
            behind it, with which it would change places. 1 where nothing was drawn.
    """

    token_id: int
    top_two_margin: float
    edge_distance: float


def sample(
    logits_V: torch.Tensor | npt.NDArray[np.float32], params: SamplingParams, position: int
) -> SampledToken:
    """Chooses the token at `position` (its index in the sequence, prompt included).

    Raises:
        LogitsNotFinite: a logit is NaN or plus infinity, or all are minus infinity.
    """
    if not isinstance(logits_V, np.ndarray):
        logits_V = logits_V.float().cpu().numpy()
    top = float(logits_V.max())
    # max() of numpy propagates NaN, so one look covers all.
    if not math.isfinite(top):
        raise LogitsNotFinite(
            f"largest logit at position {position} is {top}",
            hint="check the model's weights and the KV blocks that the sequence pulled",
        )
    margin = math.inf
    if len(logits_V) > 1:
        second, first = np.partition(logits_V, len(logits_V) - 2)[-2:]
        margin = float(first) - float(second)
    if params.temperature == 0.0:
        # argmax takes the first of equal ones: the lowest id.
        return SampledToken(
            token_id=int(logits_V.argmax()), top_two_margin=margin, edge_distance=1.0
        )
    token_id, edge_distance = _drawn(logits_V, params, uniform(params.seed, position))
    return SampledToken(token_id=token_id, top_two_margin=margin, edge_distance=edge_distance)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), 53 random bits, everywhere the same for one seed and position."""
    text = _DOMAIN + seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 11) * 2.0**-53


def _drawn(
    logits_V: npt.NDArray[np.float32], params: SamplingParams, u: float
) -> tuple[int, float]:
    """The token whose interval holds u, and the distance to the nearest edge."""
    scaled = logits_V.astype(np.float64)
    scaled = (scaled - scaled.max()) / params.temperature
    weights = np.exp(scaled)
    order = np.argsort(-weights, kind="stable")
    ranked = weights[order]
    cumulative = np.cumsum(ranked[: params.top_k or None])
    mass = float(cumulative[-1])
    cumulative /= mass
    # The nucleus: the shortest beginning whose mass reaches top_p.
    size = min(int(np.searchsorted(cumulative, params.top_p)) + 1, len(cumulative))
    edges = cumulative[:size] / cumulative[size - 1]
    # side="right": an interval holds its lower edge, not its upper one.
    index = min(int(np.searchsorted(edges, u, side="right")), size - 1)
    # Neither 0 nor 1 is an edge that rounding could carry the draw across.
    distances = [1.0]
    if index > 0:
        distances += [u - float(edges[index - 1]), float(ranked[index - 1] - ranked[index]) / mass]
    if index < size - 1:
        distances.append(float(edges[index]) - u)
    if index < len(ranked) - 1:
        distances.append(float(ranked[index] - ranked[index + 1]) / mass)
    if params.top_p < 1.0:
        distances.append(float(np.abs(cumulative - params.top_p).min()))
    return int(order[index]), min(distances)

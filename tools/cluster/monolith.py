"""The same model in one piece, as the reference for what a cluster generated.

Rules kept here: the prompt is computed in one go and each further token by itself, with nothing but the model: no
store, no chunks, no batch. The cluster's tokens are followed, and at each of them the model says what it would have
chosen, so that one difference does not hide those behind it. A difference counts as rounding only where the model's
two best logits lie nearer than `ROUNDING_MARGIN` at a logit std of `ROUNDING_STD`, in proportion otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.engines.model.kv_memory import KvMemory
from snowskin.engines.model.llama import LlamaModel, Span, load_model
from snowskin.engines.model.sampler import SamplingParams, sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

ROUNDING_MARGIN = 1e-3
ROUNDING_STD = 16.0
BLOCK_SIZE = 16
_GREEDY = SamplingParams(temperature=0.0)


class ComparisonCancelled(Exception):
    """The caller asked for the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A token that the model in one piece would not have chosen.

    Attributes:
        index: of the generated token, from 0.
        margin: between the model's two best logits there.
        margin_allowed: below it the difference is rounding.
    """

    index: int
    token_id: int
    expected_token_id: int
    margin: float
    margin_allowed: float

    @property
    def is_rounding(self) -> bool:
        """Whether the two best logits were too near to tell."""
        return self.margin < self.margin_allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How a cluster's tokens compare."""

    num_tokens: int
    differences: tuple[Difference, ...] = ()

    @property
    def num_rounding(self) -> int:
        """Differences that rounding explains."""
        return sum(difference.is_rounding for difference in self.differences)

    @property
    def num_wrong(self) -> int:
        """Differences that nothing explains."""
        return len(self.differences) - self.num_rounding


class Monolith:
    """A loaded model; torch must have been given its threads before this module was imported."""

    def __init__(self, directory: Path | str) -> None:
        """Loads the model in float32 on the CPU; raises as `load_model`."""
        self._model: LlamaModel = load_model(directory)

    def compare(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        *,
        stopped: bool,
        end_token_ids: Sequence[int] = (),
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Agreement:
        """Follows `token_ids` after the prompt, and notes each token that it would not have chosen.

        Args:
            prompt_token_ids: the prompt.
            token_ids: what the cluster generated, greedily.
            stopped: whether the cluster ended because of an end token, which may or may not be the last of
                `token_ids`.
            end_token_ids: the model's end tokens.
            is_cancelled: looked at before each step.

        Raises:
            ComparisonCancelled: `is_cancelled` said so.
        """
        ended_by_token = bool(token_ids) and token_ids[-1] in end_token_ids
        asks_for_end = stopped and not ended_by_token
        num_positions = len(prompt_token_ids) + len(token_ids)
        num_blocks = -(-num_positions // BLOCK_SIZE)
        memory = KvMemory(self._model.config, num_blocks, BLOCK_SIZE)
        block_ids = memory.allocate(num_blocks)
        differences = []
        fed, start = list(prompt_token_ids), 0
        for index in range(len(token_ids) + asks_for_end):
            if is_cancelled():
                raise ComparisonCancelled
            span = Span(token_ids=fed, start=start, block_ids=block_ids)
            logits = self._model.forward([span], memory)[0]
            start += len(fed)
            wanted = tuple(token_ids[index : index + 1]) or tuple(end_token_ids)
            difference = _difference(logits, index, start, wanted)
            if difference is not None:
                differences.append(difference)
            fed = list(token_ids[index : index + 1])
        return Agreement(num_tokens=len(token_ids), differences=tuple(differences))


def _difference(
    logits: torch.Tensor, index: int, position: int, wanted: tuple[int, ...]
) -> Difference | None:
    sampled = sample(logits, _GREEDY, position)
    if sampled.token_id in wanted:
        return None
    return Difference(
        index=index,
        token_id=wanted[0] if wanted else -1,
        expected_token_id=sampled.token_id,
        margin=sampled.top_two_margin,
        margin_allowed=ROUNDING_MARGIN * float(logits.std()) / ROUNDING_STD,
    )

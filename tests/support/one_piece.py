"""The model in one piece, many prompts at a time: what a cluster's answers are held against.

Rules kept here: nothing but the model: each prompt is computed in one go, alone; no store, no chunks, no hand-off.
Only the steps of one token run side by side, to be fast. A difference counts as rounding only where the model itself
was undecided, and what follows one is not looked at any more.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.engines.model.kv_memory import KvMemory
from snowskin.engines.model.llama import Span, load_model
from snowskin.engines.model.sampler import SamplingParams, sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

    from snowskin.engines.model.sampler import SampledToken

BLOCK_SIZE = 32  # unlike the cluster's, on purpose
NUM_SIDE_BY_SIDE = 32
ROUNDING_MARGIN = 1e-3
ROUNDING_STD = 16.0
# A draw is undecided where so small a shift of the distribution would change it: logits that move by the margin
# above move a probability by a thousandth of itself.
ROUNDING_EDGE = 1e-3
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token, and whether rounding could have made it another one."""

    token_id: int
    is_undecided: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How answers compare, token by token up to the first difference of each."""

    num_tokens: int
    num_rounding: int
    wrong: tuple[str, ...]


class OnePiece:
    """A loaded model."""

    def __init__(self, directory: Path) -> None:
        self._model = load_model(directory)

    def answer(
        self, prompt: Sequence[int], num_tokens: int, sampling: SamplingParams = GREEDY
    ) -> list[Chosen]:
        """What comes behind one prompt."""
        (answer,) = self.answers([prompt], num_tokens, [sampling])
        return answer

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        samplings: Sequence[SamplingParams] | None = None,
    ) -> list[list[Chosen]]:
        """What comes behind each prompt."""
        samplings = samplings or [GREEDY] * len(prompts)
        found = []
        for first in range(0, len(prompts), NUM_SIDE_BY_SIDE):
            some = slice(first, first + NUM_SIDE_BY_SIDE)
            found += self._answers(prompts[some], num_tokens, samplings[some])
        return found

    def _answers(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, samplings: Sequence[SamplingParams]
    ) -> list[list[Chosen]]:
        sizes = [-(-(len(prompt) + num_tokens) // BLOCK_SIZE) for prompt in prompts]
        memory = KvMemory(self._model.config, sum(sizes), BLOCK_SIZE)
        tables = [memory.allocate(size) for size in sizes]
        answers = []
        for prompt, table, sampling in zip(prompts, tables, samplings, strict=True):
            span = Span(token_ids=prompt, start=0, block_ids=table)
            logits = self._model.forward([span], memory)[0]
            answers.append([_chosen(logits, sampling, len(prompt))])
        for step in range(num_tokens - 1):
            spans = [
                Span(token_ids=[answer[-1].token_id], start=len(prompt) + step, block_ids=table)
                for prompt, table, answer in zip(prompts, tables, answers, strict=True)
            ]
            rows = self._model.forward(spans, memory)
            for row, prompt, answer, sampling in zip(
                rows, prompts, answers, samplings, strict=True
            ):
                answer.append(_chosen(row, sampling, len(prompt) + step + 1))
        return answers

    def follow(self, conversations: Sequence[tuple[Sequence[int], Sequence[range]]]) -> Agreement:
        """Reads whole conversations, and at each generated position says what it would have chosen itself.

        Args:
            conversations: the token ids of each from its first to its last, and the positions that were generated
                greedily. A conversation is read once, however many turns it has.
        """
        count = _Count()
        for first in range(0, len(conversations), NUM_SIDE_BY_SIDE):
            for index, position, token_id, chosen in self._follow(
                conversations[first : first + NUM_SIDE_BY_SIDE]
            ):
                count.compare(
                    f"conversation {first + index}, position {position}", token_id, chosen
                )
        return count.agreement()

    def _follow(
        self, conversations: Sequence[tuple[Sequence[int], Sequence[range]]]
    ) -> Iterator[tuple[int, int, int, Chosen]]:
        sizes = [-(-len(token_ids) // BLOCK_SIZE) for token_ids, _ in conversations]
        memory = KvMemory(self._model.config, sum(sizes), BLOCK_SIZE)
        tables = [memory.allocate(size) for size in sizes]
        left = [deque(itertools.chain(*generated)) for _, generated in conversations]
        fed = [0] * len(conversations)
        while indices := [index for index, positions in enumerate(left) if positions]:
            positions = [left[index].popleft() for index in indices]
            spans = [
                Span(
                    token_ids=conversations[index][0][fed[index] : position],
                    start=fed[index],
                    block_ids=tables[index],
                )
                for index, position in zip(indices, positions, strict=True)
            ]
            rows = self._model.forward(spans, memory)
            for row, index, position in zip(rows, indices, positions, strict=True):
                fed[index] = position
                chosen = _chosen(row, GREEDY, position)
                yield index, position, conversations[index][0][position], chosen


def _chosen(logits: torch.Tensor, sampling: SamplingParams, position: int) -> Chosen:
    sampled = sample(logits, sampling, position)
    return Chosen(sampled.token_id, _is_undecided(sampled, float(logits.std()), sampling))


def _is_undecided(sampled: SampledToken, std: float, sampling: SamplingParams) -> bool:
    if sampling.temperature > 0.0:
        return sampled.edge_distance < ROUNDING_EDGE
    return sampled.top_two_margin < ROUNDING_MARGIN * std / ROUNDING_STD


@dataclass(slots=True)
class _Count:
    """Tokens compared so far."""

    num_tokens: int = 0
    num_rounding: int = 0
    wrong: list[str] = field(default_factory=list)

    def compare(self, where: str, token_id: int, chosen: Chosen) -> bool:
        """Whether the token is the one that the model chose."""
        self.num_tokens += 1
        if token_id == chosen.token_id:
            return True
        if chosen.is_undecided:
            self.num_rounding += 1
        else:
            self.wrong.append(f"{where}: {token_id}, not {chosen.token_id}")
        return False

    def agreement(self) -> Agreement:
        """The sum."""
        return Agreement(
            num_tokens=self.num_tokens, num_rounding=self.num_rounding, wrong=tuple(self.wrong)
        )


def agreement(answers: Sequence[Sequence[int]], expected: Sequence[Sequence[Chosen]]) -> Agreement:
    """Compares; `wrong` has a sentence for each answer with a difference that nothing explains."""
    count = _Count()
    for index, (answer, reference) in enumerate(zip(answers, expected, strict=True)):
        if len(answer) != len(reference):
            count.wrong.append(f"answer {index} has {len(answer)} tokens, not {len(reference)}")
        for position, (token_id, chosen) in enumerate(zip(answer, reference, strict=False)):
            if not count.compare(f"answer {index}, token {position}", token_id, chosen):
                break
    return count.agreement()

"""Drawing tokens with a generator of one request's own.

Torch's generator is shared by all threads, so a seed would mean nothing while another request is
running. A token is drawn from softmax(z) by taking the largest z + g, where g are independent
Gumbel variables: ``generate`` then searches greedily for what has been drawn.

Source: Maddison, Tarlow and Minka 2014, "A* Sampling", arXiv:1411.0030, section 2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import FloatTensor, LongTensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to the scores, so that the largest is a sample."""

    def __init__(self, device: torch.device, seed: int | None) -> None:
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:  # noqa: ARG002
        """Return the scores ``(rows, vocabulary)`` with noise."""
        waiting = torch.empty_like(scores).exponential_(generator=self._generator)
        noisy: Any = scores - waiting.log()
        return noisy


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: Only the fewest tokens of this probability.
        top_k: Only so many tokens; None for all.
        seed: Of the draws; None for another one each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def processors(self, device: torch.device) -> LogitsProcessorList:
        """Return what makes of scores ones whose largest is the token drawn."""
        if self.temperature == 0:
            return LogitsProcessorList()
        made: list[LogitsProcessor] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            made.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            made.append(TopPLogitsWarper(float(self.top_p)))
        return LogitsProcessorList([*made, GumbelNoise(device, self.seed)])

"""What healing minimises: language modelling, distillation, or a mix.

All terms are summed over the scored tokens of a batch, so that steps of several forward passes add
up to the mean over all of their tokens, whatever the windows' lengths.

Source: distillation of predictions, Hinton et al. 2015, arXiv:1503.02531; of hidden states, as in
Jiao et al. 2020, "TinyBERT", arXiv:1909.10351, here without a projection, each token's distance
divided by the length of the teacher's state; a teacher tuned on the same text, Sreenivas et al.
2024, "LLM Pruning and Distillation in Practice", arXiv:2408.11796 (teacher correction).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.predictions import IGNORED, chunks
from hf_sparse_pathways.discovery.windows import Batch

LANGUAGE_MODELLING: Mapping[str, float] = {"lm": 1.0}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A sum of terms.

    Attributes:
        terms: Term -> factor, as ``parse_loss`` returns them.
        teacher: A model whose hidden states are as wide as the student's; None without
            distillation.
    """

    terms: Mapping[str, float]
    teacher: Any = None

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss summed over a batch's scored tokens, with a gradient in the model."""
        device = next(model.parameters()).device
        ids, mask = batch.ids.to(device), batch.mask.to(device)
        hidden = "hidden" in self.terms
        theirs = None
        if self.teacher is not None:
            with torch.no_grad():
                theirs = _run(self.teacher, ids, mask, hidden)
        own = _run(model, ids, mask, hidden)
        loss = own.logits.new_zeros((), dtype=torch.float32)
        if {"lm", "kl"} & set(self.terms):
            expected = theirs.logits if theirs is not None and "kl" in self.terms else None
            targets = ids[:, 1:].masked_fill(~mask[:, 1:], IGNORED)
            factors = (self.terms.get("lm", 0.0), self.terms.get("kl", 0.0))
            loss = loss + _apply(own.logits, targets, expected, factors)
        if theirs is not None and hidden:
            distance = hidden_distance(own.hidden_states, theirs.hidden_states, mask[:, 1:])
            loss = loss + self.terms["hidden"] * distance
        return loss


class _Predictions(torch.autograd.Function):
    """``lm * cross-entropy + kl * KL(teacher || student)``, summed over tokens, in nats.

    The gradient in the logits, ``(lm + kl) softmax(logits) - lm onehot - kl softmax(teacher's)``,
    is made beside the loss, a few tokens at a time: as many float32 copies of all logits as
    autograd would keep are most of a small model's memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        expected: Tensor | None,
        factors: tuple[float, float],
    ) -> Tensor:
        """Return the loss.

        Args:
            ctx: Autograd's.
            logits: ``(batch, tokens, vocabulary)``.
            targets: The next tokens' ids, ``(batch, tokens - 1)``, or ``IGNORED``.
            expected: The teacher's logits, if ``kl`` is not 0.
            factors: Of the two terms, ``(lm, kl)``.
        """
        gradient = torch.zeros_like(logits)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for place in _places(targets, logits.shape[-1]):
            theirs = None if expected is None else expected[place]
            loss, slope = _predict(logits[place], targets[place], theirs, factors)
            total += loss
            gradient[place] = slope.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        """Return the gradient in the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None


_apply: Callable[..., Tensor] = _Predictions.apply


def _places(targets: Tensor, vocabulary: int) -> Iterator[tuple[int, slice]]:
    """Yield a row, and some of its tokens, until all that have a target were yielded."""
    for row, length in enumerate((targets != IGNORED).sum(1).tolist()):
        yield from ((row, part) for part in chunks(0, length, vocabulary))


def _predict(
    logits: Tensor, targets: Tensor, expected: Tensor | None, factors: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the loss of some tokens, and its gradient in their logits, float32."""
    lm, kl = factors
    kept = targets != IGNORED
    own = torch.log_softmax(logits.float(), -1)
    places = targets.clamp_min(0).unsqueeze(-1)
    loss = -lm * own.gather(-1, places).squeeze(-1)
    slope = own.exp().mul_(lm + (0.0 if expected is None else kl))
    slope.scatter_add_(-1, places, torch.full_like(places, -lm, dtype=slope.dtype))
    if expected is not None:
        theirs = torch.log_softmax(expected.float(), -1)
        probabilities = theirs.exp()
        loss = loss + kl * (probabilities * (theirs - own)).sum(-1)
        slope.sub_(probabilities, alpha=kl)
    return (loss * kept).double().sum(), slope.mul_(kept.unsqueeze(-1))


def count_scored(batch: Batch) -> int:
    """Return how many tokens of a batch are predicted from others."""
    return int(batch.mask[:, 1:].sum())


def hidden_distance(own: Any, expected: Any, scored: Tensor) -> Tensor:
    """Return the squared distance of hidden states over their squared length, summed over tokens.

    Args:
        own: The student's, one ``(batch, tokens, d_model)`` per layer, the embeddings first.
        expected: The teacher's.
        scored: bool ``(batch, tokens - 1)``.
    """
    distances = []
    for mine, theirs in zip(own[1:], expected[1:], strict=True):
        reference = theirs[:, :-1].float()
        length = reference.square().sum(-1).clamp_min(1e-12)
        distance = (mine[:, :-1].float() - reference).square().sum(-1) / length
        distances.append(distance.masked_fill(~scored, 0.0).sum())
    return torch.stack(distances).mean()


def _run(model: Any, ids: Tensor, mask: Tensor, hidden: bool) -> Any:
    attended = None if bool(mask.all()) else mask.long()
    return model(
        input_ids=ids, attention_mask=attended, use_cache=False, output_hidden_states=hidden
    )

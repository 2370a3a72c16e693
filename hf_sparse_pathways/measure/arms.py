"""Arms: what is compared on the same text, batch by batch, with the dense model first."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_sparse_pathways.discovery.documents import Documents
from hf_sparse_pathways.discovery.precision import quick_products
from hf_sparse_pathways.discovery.trials import run_model
from hf_sparse_pathways.discovery.windows import (
    Batch,
    Window,
    draw_windows,
    make_batches,
)
from hf_sparse_pathways.errors import PathwaysError, TextError
from hf_sparse_pathways.measure.fidelity import (
    Passed,
    WindowScore,
    compare,
    first_scored,
    resampled_ratio,
    watching,
)
from hf_sparse_pathways.measure.quality_report import QualityRow
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.processes import ALONE, Processes

Forward = Callable[[Any, Batch], Tensor]
"""From a model and a batch to logits ``(batch, tokens, vocabulary)``."""


@dataclass(frozen=True)
class MeasuredArm:
    """One way to compute the model.

    Attributes:
        role: As in ``QualityRow``.
        pathway: Name of the pathway, if one runs.
        flops: FFN FLOPs as a fraction of dense.
        forward: Computes it.
        sparsity: Fraction of neurons removed; None where the arm chooses them while it runs.
        set: As in ``QualityRow``.
        experts: As in ``QualityRow``.
    """

    role: str
    pathway: str | None
    flops: float
    forward: Forward
    sparsity: float | None = None
    set: str | None = None
    experts: float | None = None


@dataclass(frozen=True)
class ScoredText:
    """One domain's held-out windows.

    Attributes:
        domain: Whose text.
        windows: What is scored, each window on its own.
        excluded: Documents left out because the pathways were calibrated on them.
        tokenizer: Turns ids back into text, whose bytes are counted.
        context: Fraction of each window at its beginning that is not scored.
    """

    domain: str
    windows: tuple[Window, ...]
    excluded: int
    tokenizer: Any
    context: float = 0.0

    @classmethod
    def draw(  # noqa: PLR0913
        cls,
        domain: str,
        documents: Documents,
        tokenizer: Any,
        *,
        max_tokens: int,
        max_length: int,
        seed: int,
        excluded: int = 0,
        context: float = 0.0,
    ) -> Self:
        """Draw windows as ``draw_windows`` does, those without a scored token left out.

        Raises:
            TextError: None is left.
        """
        drawn = draw_windows(
            documents, tokenizer, max_tokens=max_tokens, max_length=max_length, seed=seed
        )
        windows = tuple(w for w in drawn if len(w.ids) > first_scored(len(w.ids), context))
        if not windows:
            raise TextError(f"Domain {domain!r} has no held-out text of two tokens or more.")
        return cls(domain, windows, excluded, tokenizer, context)

    def bytes(self) -> int:
        """Return the UTF-8 bytes of the scored tokens' text."""
        scored = (w.ids[first_scored(len(w.ids), self.context) :] for w in self.windows)
        return sum(len(self.tokenizer.decode(list(ids)).encode(errors="replace")) for ids in scored)


DENSE = MeasuredArm(
    "dense", None, 1.0, lambda model, batch: run_model(model, batch, domain=None), 0.0
)


def pathway_arm(
    role: str, name: str, pathways: Pathways, *, runs: str | None = None, label: str | None = None
) -> MeasuredArm:
    """Return the arm of one of a model's pathways or controls.

    Args:
        role: As in ``QualityRow``.
        name: Its name among the pathways.
        pathways: Where it is described.
        runs: What the model calls it, if that is another name.
        label: What the set of pathways is called, where there are several.
    """
    return MeasuredArm(
        role,
        name,
        pathways.flops(name),
        lambda model, batch: run_model(model, batch, domain=runs or name),
        pathways.sparsity(name),
        label,
        1.0 - pathways.expert_sparsity(name) if pathways[name].experts else None,
    )


def measure_arms(
    model: Any,
    text: ScoredText,
    arms: Sequence[MeasuredArm],
    *,
    batch_size: int,
    seed: int,
    processes: Processes = ALONE,
) -> list[QualityRow]:
    """Return one row per arm; the first arm has to be the dense one.

    Args:
        model: What the arms compute.
        text: What is scored.
        arms: What is compared.
        batch_size: Windows per forward pass.
        seed: Of the resampling.
        processes: Those that share the batches; each gets all rows.

    Raises:
        PathwaysError: A loss is NaN.
    """
    own = _score(model, text, arms, batch_size, processes)
    scores: list[dict[int, WindowScore]] = [{} for _ in arms]
    for part in processes.gather(own):
        for whole, more in zip(scores, part, strict=True):
            whole.update(more)
    ordered = [[found[index] for index in sorted(found)] for found in scores]
    size = text.bytes()
    return [
        _row(text, arm, found, ordered[0], size, seed)
        for arm, found in zip(arms, ordered, strict=True)
    ]


def _score(
    model: Any,
    text: ScoredText,
    arms: Sequence[MeasuredArm],
    batch_size: int,
    processes: Processes,
) -> list[dict[int, WindowScore]]:
    """Return each arm's scores of this process's windows, by their places in the text."""
    scores: list[dict[int, WindowScore]] = [{} for _ in arms]
    places = {id(window): index for index, window in enumerate(text.windows)}
    batches = processes.share(list(make_batches(text.windows, batch_size)))
    total = sum(int(batch.mask.sum()) for batch in batches) * len(arms)
    silent = None if processes.is_first else True
    bar = tqdm(total=total, desc=f"evaluate {text.domain}", unit="tok", disable=silent)
    with bar, torch.no_grad(), quick_products(model), watching(model) as watch:
        for batch in batches:
            dense: Passed | None = None
            for arm, own in zip(arms, scores, strict=True):
                passed = watch(partial(arm.forward, model, batch))
                dense = dense or passed
                for window, score in zip(
                    batch.windows, compare(batch, dense, passed, context=text.context), strict=True
                ):
                    _check_number(text.domain, arm, score.loss)
                    own[places[id(window)]] = score
                bar.update(int(batch.mask.sum()))
    return scores


def _check_number(domain: str, arm: MeasuredArm, loss: float) -> None:
    if math.isnan(loss):
        raise PathwaysError(
            f"The loss of {arm.pathway or 'the dense model'!r} on {domain!r} text is NaN. Check "
            "the weights, or load them in float32."
        )


def _row(
    text: ScoredText,
    arm: MeasuredArm,
    scores: Sequence[WindowScore],
    dense: Sequence[WindowScore],
    size: int,
    seed: int,
) -> QualityRow:
    """Sum an arm's windows up."""
    tokens = sum(score.tokens for score in scores)
    loss, dense_loss = (sum(score.loss for score in arm) for arm in (scores, dense))
    by_document: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for window, own, reference in zip(text.windows, scores, dense, strict=True):
        sums = by_document[window.document.digest if window.document else id(window)]
        sums[0] += own.loss - reference.loss
        sums[1] += own.tokens
    differences = [sums[0] for sums in by_document.values()]
    counts = [int(sums[1]) for sums in by_document.values()]
    cosines = [sum(c) / tokens for c in zip(*(score.cosines for score in scores), strict=True)]
    return QualityRow(
        domain=text.domain,
        role=arm.role,
        pathway=arm.pathway,
        perplexity=_exp(loss / tokens),
        ratio=_exp(loss / tokens) / _exp(dense_loss / tokens),
        interval=resampled_ratio(differences, counts, seed=seed),
        bits_per_byte=loss / math.log(2.0) / max(size, 1),
        divergence=sum(score.divergence for score in scores) / tokens,
        agreement=sum(score.agreement for score in scores) / tokens,
        cosine=cosines[-1],
        cosine_per_layer=tuple(cosines[:-1]),
        flops=arm.flops,
        tokens=tokens,
        documents=len(by_document),
        excluded=text.excluded,
        sparsity=arm.sparsity,
        set=arm.set,
        experts=arm.experts,
    )


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))

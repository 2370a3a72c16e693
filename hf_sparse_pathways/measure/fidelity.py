"""How far an arm is from the dense model on the same windows.

Per window and arm: the next-token loss, the KL divergence of its predictions from the dense
model's, how often both prefer the same token, and the cosine between their hidden states behind
each decoder layer that has an FFN block and before the head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_sparse_pathways.discovery.predictions import chunks
from hf_sparse_pathways.discovery.windows import Batch
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks


@dataclass(frozen=True, kw_only=True)
class WindowScore:
    """One arm on one window; sums over its scored tokens.

    Attributes:
        loss: Next-token loss in nats.
        divergence: KL(dense, arm) in nats.
        agreement: Tokens for which both prefer the same successor.
        tokens: Scored tokens: a window's first is context only.
        cosines: Sums over tokens of the cosine of hidden states, per layer and before the head.
    """

    loss: float
    divergence: float
    agreement: int
    tokens: int
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class Passed:
    """What a forward pass gave.

    Attributes:
        logits: ``(batch, tokens, vocabulary)``.
        hidden: Hidden states ``(batch, tokens, d_model)``, per layer and before the head.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]


@contextmanager
def watching(model: Any) -> Iterator[Callable[[Callable[[], Tensor]], Passed]]:
    """Yield a function that runs a forward pass and returns its logits and hidden states.

    Of a forward that runs the decoder more than once, the last run's hidden states are returned.
    """
    seen: list[Tensor] = []
    layers = list(dict.fromkeys(block.layer for block in _blocks(model)))
    handles = [layer.register_forward_hook(_keep_output(seen)) for layer in layers]
    head = model.get_output_embeddings()
    if head is not None:
        handles.append(head.register_forward_pre_hook(_keep_input(seen)))

    def run(forward: Callable[[], Tensor]) -> Passed:
        seen.clear()
        logits = forward()
        return Passed(logits, tuple(seen[-len(handles) :]))

    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def compare(batch: Batch, dense: Passed, arm: Passed, *, context: float = 0.0) -> list[WindowScore]:
    """Return an arm's scores on a batch, one per window.

    Args:
        batch: The windows.
        dense: What the dense model gave; the same object as ``arm`` for its own scores.
        arm: What the arm gave.
        context: Fraction of each window at its beginning that is not scored.
    """
    return [_compare_row(batch, row, dense, arm, context) for row in range(len(batch.windows))]


def _compare_row(batch: Batch, row: int, dense: Passed, arm: Passed, context: float) -> WindowScore:
    length = len(batch.windows[row].ids)
    first = first_scored(length, context)
    loss = divergence = 0.0
    agreement = 0
    for part in chunks(first - 1, length - 1, arm.logits.shape[-1]):
        targets = batch.ids[row, part.start + 1 : part.stop + 1].to(arm.logits.device)
        own = functional.log_softmax(arm.logits[row, part].float(), dim=-1)
        loss += float(functional.nll_loss(own, targets, reduction="sum"))
        if arm is dense:
            continue
        reference = functional.log_softmax(dense.logits[row, part].float(), dim=-1)
        divergence += float(functional.kl_div(own, reference, reduction="sum", log_target=True))
        agreement += int((own.argmax(-1) == reference.argmax(-1)).sum())
    return WindowScore(
        loss=loss,
        divergence=max(divergence, 0.0),
        agreement=length - first if arm is dense else agreement,
        tokens=length - first,
        cosines=_cosines(row, slice(first - 1, length - 1), dense, arm),
    )


def first_scored(length: int, context: float) -> int:
    """Return the index of a window's first token that is scored; the first is context only."""
    return max(1, int(context * length)) if length else 0


def _cosines(row: int, part: slice, dense: Passed, arm: Passed) -> tuple[float, ...]:
    """Return sums over a window's scored tokens."""
    if arm is dense:
        return (float(part.stop - part.start),) * len(dense.hidden)
    return tuple(
        float(
            functional.cosine_similarity(a[row, part].float(), b[row, part].float(), dim=-1).sum()
        )
        for a, b in zip(dense.hidden, arm.hidden, strict=True)
    )


def _blocks(model: Any) -> list[FfnBlock]:
    """Return a model's FFN blocks, also of one whose leaves an adapter wraps by now."""
    attachment = getattr(model, "_attachment", None)
    if attachment is None:
        return list(find_blocks(model))
    return [attached.block for attached in attachment.blocks]


def _keep_output(seen: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    return hook


def _keep_input(seen: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Sequence[Any]) -> None:  # noqa: ARG001
        seen.append(args[0].detach())

    return hook


def resampled_ratio(
    differences: Sequence[float], tokens: Sequence[int], *, seed: int, samples: int = 2000
) -> tuple[float, float] | None:
    """Return the 95 % interval of a perplexity ratio over resampled documents.

    Args:
        differences: Per document, the arm's summed loss minus the dense model's.
        tokens: Per document, its scored tokens.
        seed: Of the resampling.
        samples: Number of resamples.

    Returns:
        The 2.5 % and 97.5 % quantiles of ``exp(sum of differences / sum of tokens)``, documents
        drawn with replacement; None with fewer than two documents.

    Source:
        The percentile bootstrap: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
    """
    count = len(tokens)
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (samples, count), generator=generator)
    sums = torch.tensor(differences, dtype=torch.float64)[drawn].sum(1)
    totals = torch.tensor(tokens, dtype=torch.float64)[drawn].sum(1)
    ratios = (sums / totals).clamp_max(700.0).exp()
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high

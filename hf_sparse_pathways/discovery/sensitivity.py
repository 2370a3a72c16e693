"""What the loss says about FFN blocks: backward passes over a sample of a domain's text.

**Metric.** A small change d of a block's output raises the model's KL divergence from itself by
about ``d^T F d / 2`` nats per token with F = E[g g^T], where g is the gradient of ``-log p(t)`` by
the output and t a token drawn from the model's own prediction. Errors measured with F are
comparable between blocks and count only where the model notices them.

**Saliency.** Removing a neuron changes the loss on the text itself by about ``-g a``.

Source: Martens 2014, "New insights and perspectives on the natural gradient method",
arXiv:1412.1193 (labels from the model); as a metric on outputs like the output factor in
Martens & Grosse 2015, arXiv:1503.05671. Saliency: see ``scores.taylor``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.predictions import IGNORED, chunks
from hf_sparse_pathways.discovery.scores import Saliency
from hf_sparse_pathways.discovery.trials import run_model
from hf_sparse_pathways.discovery.windows import Batch, Window, make_batches, quarter
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.choices import all_dense

SAMPLE_TOKENS = (2048, 4096)
"""Least and most tokens on which sensitivity is measured; in between, a quarter of the text."""

BATCH_SIZE = 2
"""Windows per backward pass, which keeps every layer's intermediate results."""

SHRINKAGE = 0.05
"""Share of the mean diagonal that is added: directions that a small sample has not seen count."""

Labels = Callable[[Tensor, Tensor], Tensor]
"""From probabilities ``(tokens, vocabulary)`` and the tokens' successors in the text, ``IGNORED``
at a window's end, to the labels whose loss is measured."""


def measure_metrics(
    model: nn.Module, windows: Sequence[Window], *, seed: int = 0, label: str = ""
) -> tuple[Tensor, ...]:
    """Return one metric per FFN block, float32 ``(d_out, d_out)``. The model is left as it was.

    Args:
        model: A causal LM, run densely.
        windows: Text; it is measured on a part of it.
        seed: Of the drawn labels.
        label: The domain, for the progress bar.
    """
    blocks = find_blocks(model)
    totals = [torch.zeros(block.d_out, block.d_out) for block in blocks]
    generator = torch.Generator().manual_seed(seed)

    def draw(probabilities: Tensor, _: Tensor) -> Tensor:
        return _draw_labels(probabilities, generator)

    tokens = 0
    for rows, _, gradients in _gradients(model, windows, draw, "output", label):
        tokens += len(rows)
        for total, gradient in zip(totals, gradients, strict=True):
            total.addmm_(gradient.T, gradient)
    return tuple(_shrunk(total / max(tokens, 1)) for total in totals)


def measure_saliency(
    model: nn.Module, windows: Sequence[Window], *, label: str = ""
) -> tuple[Saliency, ...]:
    """Return every FFN block's saliency on a text. The model is left as it was.

    Args:
        model: A causal LM, run densely.
        windows: Text; it is measured on a part of it.
        label: The domain, for the progress bar.
    """
    sums = [torch.zeros(2, block.d_ff, dtype=torch.float64) for block in find_blocks(model)]

    def read(_: Tensor, successors: Tensor) -> Tensor:
        return successors

    for _, activations, gradients in _gradients(model, windows, read, "activation", label):
        for total, activation, gradient in zip(sums, activations, gradients, strict=True):
            effect = (activation * gradient).double()
            total += torch.stack([effect.sum(0), effect.abs().sum(0)])
    return tuple(Saliency(signed=total[0], absolute=total[1]) for total in sums)


def _gradients(
    model: nn.Module, windows: Sequence[Window], labels: Labels, where: str, label: str
) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """Yield per batch its real tokens, and per block the values there and the loss's gradients.

    Args:
        model: Run densely.
        windows: Text.
        labels: Of the loss, which is summed over tokens.
        where: ``"activation"`` or ``"output"`` of the block.
        label: For the progress bar.
    """
    values: dict[int, Tensor] = {}
    blocks = find_blocks(model)
    sample = _first(windows, quarter(windows, SAMPLE_TOKENS))
    batches = list(make_batches(sample, BATCH_SIZE))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(all_dense())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_only_activations(model))
        for index, block in enumerate(blocks):
            handle = block.outgoing.register_forward_hook(_remember(values, index, where))
            stack.callback(handle.remove)
        for batch in tqdm(batches, desc=f"sensitivity {label}", unit="batch", disable=None):
            rows = batch.mask.flatten().nonzero().flatten()
            with torch.enable_grad():
                logits = run_model(model, batch)
                slope = _slope(logits.detach(), batch, labels)
                seen = [values[index] for index in range(len(blocks))]
                gradients = torch.autograd.grad(logits, seen, slope)
            values.clear()
            yield (
                rows,
                [_at(v.detach(), rows).cpu() for v in seen],
                [_at(gradient, rows).cpu() for gradient in gradients],
            )


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """Return float32 ``(tokens, width)`` of the real tokens."""
    return values.flatten(0, -2).index_select(0, rows.to(values.device)).float()


def _slope(logits: Tensor, batch: Batch, labels: Labels) -> Tensor:
    """Return the gradient of the cross-entropy in the logits, 0 where there is no label."""
    slope = torch.zeros_like(logits)
    successors = _successors(batch).to(logits.device)
    for row, window in enumerate(batch.windows):
        for part in chunks(0, len(window.ids), logits.shape[-1]):
            own = logits[row, part].float().softmax(-1)
            chosen = labels(own, successors[row, part]).unsqueeze(-1)
            one = own.new_full(chosen.shape, -1.0)
            own.scatter_add_(-1, chosen.clamp_min(0), one)
            slope[row, part] = own.masked_fill_(chosen == IGNORED, 0.0).to(slope.dtype)
    return slope


def _successors(batch: Batch) -> Tensor:
    """Return each token's successor in its window, ``IGNORED`` at the end, ``(batch, tokens)``."""
    following = torch.full_like(batch.ids, IGNORED)
    following[:, :-1] = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], IGNORED)
    return following


def _first(windows: Sequence[Window], tokens: int) -> list[Window]:
    """Return windows until a number of tokens is met."""
    chosen: list[Window] = []
    for window in windows:
        if tokens <= 0:
            break
        chosen.append(window)
        tokens -= len(window.ids)
    return chosen


def _draw_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token per prediction, by inverting the cumulative distribution on the CPU."""
    cumulative = probabilities.cumsum(-1).cpu()
    uniform = torch.rand(len(cumulative), 1, generator=generator) * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, uniform).squeeze(1)
    return labels.clamp_max(probabilities.shape[1] - 1).to(probabilities.device)


def _remember(values: dict[int, Tensor], index: int, where: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        values[index] = output if where == "output" else args[0]

    return hook


@contextmanager
def _only_activations(model: Any) -> Iterator[None]:
    """Within the block gradients flow to activations, from the embeddings on, and no weight."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.detach().requires_grad_()
    )
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _shrunk(metric: Tensor) -> Tensor:
    metric.diagonal().add_(SHRINKAGE * metric.diagonal().mean() + 1e-12)
    return metric

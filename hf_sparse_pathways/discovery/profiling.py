"""Activation profiles: what each FFN neuron does on a domain's text.

A forward pre-hook on every outgoing leaf sees the activation, drops padding, and adds to five
running statistics per neuron: sum |a|, sum a, sum a^2, the count of a > 0, and max |a|.

Source: A. Young 2026, "Sparse Pathways", profiles E[|a|] per domain; the other moments serve other
scores (``discovery/scores.py``).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_sparse_pathways.discovery.statistics import (
    BlockStatistics,
    DomainProfile,
    Profile,
    check_statistics,
)
from hf_sparse_pathways.discovery.text import Documents, TextSource, read_documents
from hf_sparse_pathways.discovery.windows import (
    Batch,
    Window,
    count_tokens,
    draw_windows,
    make_batches,
    resolve_length,
)
from hf_sparse_pathways.errors import PathwaysError, TextError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.pathways.base import BaseModel

MIN_TOKENS = 32
"""Fewer tokens of a domain are refused: their statistics would be noise."""

_CHUNK_VALUES = 2**18
"""Activations that are summed at a time: one megabyte, which stays in a core's cache."""


def profile(  # noqa: PLR0913
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, TextSource],
    *,
    max_tokens: int = 65536,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Profile:
    """Take the activation profile of each domain's text. The model is left as it was.

    Args:
        model: A causal LM; one with pathways is profiled densely.
        tokenizer: Its tokenizer.
        texts: Domain name -> text source (see ``read_documents``). All of it is calibration text:
            hold out what you evaluate on.
        max_tokens: Most tokens per domain, drawn at random over all of its documents.
        max_length: Most tokens per window; by default 512, or the model's positions if fewer.
        batch_size: Windows per forward pass.
        seed: Decides which windows are drawn.

    Raises:
        UnsupportedModelError: The model has no FFN blocks.
        TextError: A source cannot be read, or has fewer than ``MIN_TOKENS`` tokens.
        PathwaysError: An activation is NaN or infinite.
    """
    base = BaseModel.of(model)
    if not texts:
        raise TextError("No domains were given. Pass a dictionary {domain: text source}.")
    max_length = resolve_length(model, max_length)
    drawn = {}
    for domain, source in texts.items():
        documents = read_documents(source, seed=seed)
        windows = draw_windows(
            documents, tokenizer, max_tokens=max_tokens, max_length=max_length, seed=seed
        )
        _check_enough(domain, documents, windows)
        drawn[domain] = (windows, _provenance(documents, windows, max_length, seed))
    by_domain = {}
    for domain, (windows, provenance) in drawn.items():
        blocks = _collect(model, domain, windows, batch_size)
        by_domain[domain] = DomainProfile(blocks=blocks, provenance=provenance)
    return Profile(base=base, by_domain=by_domain)


def _collect(
    model: nn.Module, domain: str, windows: list[Window], batch_size: int
) -> tuple[BlockStatistics, ...]:
    """Run a domain's windows through the decoder and return every block's statistics."""
    collectors = [_Collector(block.d_ff) for block in find_blocks(model)]
    decoder = getattr(model, "base_model", model)  # without the head: no logits are needed
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(all_dense())
        stack.enter_context(evaluation_mode(model))
        for collector, block in zip(collectors, find_blocks(model), strict=True):
            handle = block.outgoing.register_forward_pre_hook(collector)
            stack.callback(handle.remove)
        bar = stack.enter_context(
            tqdm(total=count_tokens(windows), desc=f"profile {domain}", unit="tok", disable=None)
        )
        for batch in make_batches(windows, batch_size):
            for collector in collectors:
                collector.begin(batch, device)
            decoder(
                input_ids=batch.ids.to(device),
                attention_mask=batch.mask.long().to(device),
                use_cache=False,
            )
            bar.update(int(batch.mask.sum()))
    for collector, block in zip(collectors, find_blocks(model), strict=True):
        check_statistics(domain, block.name, collector.statistics)
    return tuple(collector.statistics for collector in collectors)


class _Collector:
    """Forward pre-hook of one outgoing leaf that accumulates statistics."""

    def __init__(self, d_ff: int) -> None:
        self.statistics = BlockStatistics.empty(d_ff)
        self._rows: Tensor | None = None
        self._space: Tensor | None = None
        self._tokens = 0

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Take note of which tokens of the coming forward pass are real."""
        flat = batch.mask.flatten()
        self._rows = None if bool(flat.all()) else flat.nonzero().flatten().to(device)
        self._tokens = len(flat)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        activation = args[0].detach().flatten(0, -2)
        if len(activation) != self._tokens:
            raise PathwaysError(
                f"An FFN block received {len(activation)} tokens of the {self._tokens} in the "
                "batch: the model routes tokens past it, so padding cannot be told from text. "
                "Such blocks cannot be profiled."
            )
        if self._rows is not None:
            activation = activation.index_select(0, self._rows)
        chunk_tokens = max(32, _CHUNK_VALUES // activation.shape[1])
        if self._space is None:
            size = (2, chunk_tokens, activation.shape[1])
            self._space = torch.empty(size, dtype=torch.float32, device=activation.device)
        for chunk in activation.split(chunk_tokens):
            self.statistics = self.statistics.merged(_statistics(chunk, self._space))


def _statistics(activation: Tensor, space: Tensor) -> BlockStatistics:
    """Return the statistics of ``(tokens, d_ff)`` activations, computed in a working space.

    A chunk is summed in float32 (cascaded, a few hundred terms) and accumulates in float64:
    float64 throughout costs several times as much and changes the seventh digit.

    Args:
        activation: At most as many tokens as the space has.
        space: float32 ``(2, tokens, d_ff)``, overwritten; fresh memory costs more than the sums.
    """
    values, work = space[0, : len(activation)], space[1, : len(activation)]
    values.copy_(activation)
    tensors = {"sum": values.sum(0)}
    torch.abs(values, out=work)
    tensors["abs_sum"], tensors["abs_max"] = work.sum(0), work.amax(0)
    torch.square(values, out=work)
    tensors["square_sum"] = work.sum(0)
    torch.gt(values, 0, out=work)
    tensors["positive"] = work.sum(0)
    return BlockStatistics(
        tokens=len(values), **{name: tensor.double().cpu() for name, tensor in tensors.items()}
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block the model evaluates; every module then has the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_enough(domain: str, documents: Documents, windows: list[Window]) -> None:
    tokens = count_tokens(windows)
    if tokens < MIN_TOKENS:
        raise TextError(
            f"Domain {domain!r} has {tokens} tokens of text ({documents.source}); at least "
            f"{MIN_TOKENS} are needed, and tens of thousands for a good selection."
        )


def _provenance(
    documents: Documents, windows: list[Window], max_length: int, seed: int
) -> dict[str, Any]:
    digests = sorted({window.document.digest for window in windows})
    cut = sorted({window.document.whole for window in windows if window.document.whole})
    return {
        "source": documents.source,
        "documents": len(digests),
        "tokens": count_tokens(windows),
        "max_length": max_length,
        "seed": seed,
        "digests": digests,
        "cut_digests": cut,
    }

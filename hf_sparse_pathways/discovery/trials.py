"""Trying pathways out on a dense model: compute them for a while, and measure the loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_sparse_pathways.discovery.passes import evaluation_mode, find_device
from hf_sparse_pathways.discovery.predictions import chunks
from hf_sparse_pathways.discovery.windows import Batch, Window, make_batches
from hf_sparse_pathways.ffn.attached_block import AttachedBlock
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.choices import ModelKey, all_dense, push_choice, remove_choice
from hf_sparse_pathways.ffn.clusters import Kept


@contextmanager
def computing(blocks: Sequence[FfnBlock], pathways: Sequence[Kept]) -> Iterator[None]:
    """Within the block, FFN blocks of a dense model compute pathways; then they are as before.

    Where the model has FFN layers of its own, and so pathways, these are not in use meanwhile.
    """
    key = ModelKey()
    attached: list[AttachedBlock] = []
    choice = push_choice(key, 0, executor="compact", copies=0)
    try:
        for block, pathway in zip(blocks, pathways, strict=True):
            attached.append(AttachedBlock(block, key))
            attached[-1].state.set_pathways((pathway,))
            attached[-1].settle()
        yield
    finally:
        remove_choice(choice)
        for holder in attached:
            holder.detach()


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    windows: Sequence[Window],
    pathways: Sequence[Kept] | None,
    blocks: Sequence[FfnBlock],
    *,
    batch_size: int = 8,
) -> float:
    """Return the mean loss in nats per token of a dense model, or of pathways on it."""
    total, tokens = 0.0, 0
    chosen = () if pathways is None else pathways
    with all_dense(), evaluation_mode(model), computing(blocks if chosen else (), chosen):
        for batch in make_batches(windows, batch_size):
            loss, count = batch_loss(run_model(model, batch), batch)
            total, tokens = total + loss, tokens + count
    return total / max(tokens, 1)


def run_model(model: Any, batch: Batch, **kwargs: Any) -> Tensor:
    """Return a batch's logits ``(batch, tokens, vocabulary)``."""
    device = find_device(model)
    logits: Tensor = model(
        input_ids=batch.ids.to(device),
        attention_mask=batch.mask.long().to(device),
        use_cache=False,
        **kwargs,
    ).logits
    return logits


def batch_loss(logits: Tensor, batch: Batch) -> tuple[float, int]:
    """Return the summed next-token loss and the number of scored tokens.

    A window's first token is context only.
    """
    total, tokens = 0.0, 0
    for row, window in enumerate(batch.windows):
        length = len(window.ids)
        targets = batch.ids[row, 1:length].to(logits.device)
        for part in chunks(0, length - 1, logits.shape[-1]):
            scores = logits[row, part].float()
            total += float(functional.cross_entropy(scores, targets[part], reduction="sum"))
        tokens += length - 1
    return total, tokens

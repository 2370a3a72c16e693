"""Running a model over batches of text: densely, in evaluation mode, without its head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_sparse_pathways.discovery.windows import Batch


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


def find_device(model: nn.Module) -> torch.device:
    """Return where a model's inputs go: to its first weights that are not offloaded.

    Where all are, accelerate moves inputs from the CPU to where it computes.
    """
    places = (weight.device for weight in model.parameters() if not weight.is_meta)
    return next(places, torch.device("cpu"))


class Finished(Exception):
    """Raised by a hook when the rest of a forward pass is not needed."""


def run_decoder(model: nn.Module, batch: Batch) -> None:
    """Run a batch through the decoder, without the head, until the end or ``Finished``."""
    decoder: Any = getattr(model, "base_model", model)
    device = find_device(model)
    try:
        decoder(
            input_ids=batch.ids.to(device),
            attention_mask=batch.mask.long().to(device),
            use_cache=False,
        )
    except Finished:
        return

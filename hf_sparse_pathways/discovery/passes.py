"""Running a model over batches of text: densely, in evaluation mode, without its head."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hf_sparse_pathways.discovery.windows import Batch
from hf_sparse_pathways.errors import UnknownNameError


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


PRECISIONS = ("model", "bfloat16", "fastest")


@contextmanager
def calibration_precision(model: nn.Module, precision: str) -> Iterator[None]:
    """Within the block, products run in the model's dtype or in bfloat16.

    Args:
        model: Its weights stay as they are.
        precision: ``"model"``, ``"bfloat16"`` (autocast), or ``"fastest"``: bfloat16 where the
            processor multiplies it in hardware.

    Raises:
        UnknownNameError: None of these.
    """
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    device = next(model.parameters()).device.type
    reduced = precision == "bfloat16" or (precision == "fastest" and _has_fast_bfloat16(device))
    with torch.autocast(device, dtype=torch.bfloat16, enabled=reduced):
        yield


def _has_fast_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and bool(known.get("amx_bf16"))


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block, and as a decorator within the function, nothing is cast automatically.

    Rankings and repairs are solved between passes in reduced precision: a product in bfloat16
    there would spoil them.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Finished(Exception):
    """Raised by a hook when the rest of a forward pass is not needed."""


def run_decoder(model: nn.Module, batch: Batch) -> None:
    """Run a batch through the decoder, without the head, until the end or ``Finished``."""
    decoder: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    try:
        decoder(
            input_ids=batch.ids.to(device),
            attention_mask=batch.mask.long().to(device),
            use_cache=False,
        )
    except Finished:
        return

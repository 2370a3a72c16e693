"""Running a model over batches of text: densely, in evaluation mode, without its head."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


def find_device(model: nn.Module) -> torch.device:
    """Return where a model's inputs go: to its first weights that are not offloaded.

    Where all are, accelerate moves inputs from the CPU to where it computes.
    """
    places = (weight.device for weight in model.parameters() if not weight.is_meta)
    return next(places, torch.device("cpu"))


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
    device, reduced = find_device(model), _reduces(model, precision)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced):
        yield


def product_dtype(model: nn.Module, precision: str) -> str:
    """Return the name of the dtype in which a precision multiplies on this machine."""
    dtype = torch.bfloat16 if _reduces(model, precision) else next(model.parameters()).dtype
    return str(dtype).removeprefix("torch.")


def _reduces(model: nn.Module, precision: str) -> bool:
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    device = find_device(model).type
    return precision == "bfloat16" or (precision == "fastest" and has_fast_bfloat16(device))


def has_fast_bfloat16(device: str) -> bool:
    """Whether a kind of device multiplies bfloat16 numbers in hardware."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and bool(known.get("amx_bf16"))


@contextmanager
def bfloat16_products(values: Tensor) -> Iterator[None]:
    """Within the block, float32 products of bfloat16 values use the processor's units for these.

    Each product is rounded to float32 and added up there, so that nothing is lost if all factors
    are bfloat16 numbers held in float32; other factors are rounded to bfloat16. Where the values
    are none, or the processor has no such units, everything is as it was.

    Args:
        values: What the factors were made from.
    """
    on_cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)  # since PyTorch 2.9
    fits = values.dtype == torch.bfloat16 and values.device.type == "cpu"
    if not (fits and hasattr(on_cpu, "fp32_precision") and has_fast_bfloat16("cpu")):
        yield
        return
    before = on_cpu.fp32_precision
    on_cpu.fp32_precision = "bf16"
    try:
        yield
    finally:
        on_cpu.fp32_precision = before


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
    device = find_device(model)
    try:
        decoder(
            input_ids=batch.ids.to(device),
            attention_mask=batch.mask.long().to(device),
            use_cache=False,
        )
    except Finished:
        return

"""In which number format products run: those of calibration, and of what is measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse_pathways.discovery.passes import find_device
from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.native.processor import has_fast_bfloat16, slow_dtypes

PRECISIONS = ("model", "bfloat16", "fastest")


@contextmanager
def calibration_precision(model: nn.Module, precision: str) -> Iterator[None]:
    """Within the block, products run in the model's dtype or in bfloat16.

    Args:
        model: Its weights stay as they are.
        precision: ``"model"``, ``"bfloat16"`` (autocast), or ``"fastest"``: bfloat16 where the
            processor multiplies it in hardware; else the model's dtype, by way of float32 where
            the processor does not multiply that either (``quick_products``).

    Raises:
        UnknownNameError: None of these.
    """
    device, reduced = find_device(model), _reduces(model, precision)
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced))
        if precision == "fastest":
            stack.enter_context(quick_products(model))
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


@contextmanager
def quick_products(model: nn.Module) -> Iterator[None]:
    """Within the block, products on the CPU in dtypes that it only emulates go through float32.

    Factors are widened for each product, and its result is rounded once: what is emulated adds up
    in float32, too. Weights and activations keep their dtypes.

    Args:
        model: What runs within; without weights of such a dtype nothing is changed.
    """
    slow = slow_dtypes()
    if all(weight.dtype not in slow for weight in model.parameters()):
        yield
        return
    with _ThroughFloat32(slow):
        yield


class _ThroughFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes products of some dtypes on the CPU in float32."""

    def __init__(self, slow: frozenset[torch.dtype]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slow = slow

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation; a product of plain tensors by way of float32."""
        given = kwargs or {}
        tensors = [value for value in args if isinstance(value, Tensor)]
        if func not in _PRODUCTS or types or not all(map(self._fits, tensors)):
            return func(*args, **given)
        wide = [value.float() if isinstance(value, Tensor) else value for value in args]
        return func(*wide, **given).to(tensors[0].dtype)

    def _fits(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.dtype in self.slow


_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv")
)


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

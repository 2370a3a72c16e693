"""``linear`` with some rows of a matrix, and weighted sums of its rows, read where they lie.

One or a few inputs, as in decoding, are multiplied by the kernel in C: no row is copied. For many,
as in a prompt, arithmetic takes the time and not the memory: rows are gathered a tile at a time,
and torch multiplies, in float32 where the processor only emulates the inputs' format.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_sparse_pathways.native.library import NativeError, find_kernel
from hf_sparse_pathways.native.processor import slow_dtypes

INPUT_DTYPES = (torch.float32, torch.bfloat16)

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)

MOST_INPUTS = 32
"""Up to so many inputs the kernel is faster than torch."""

_GATHERED = 2
"""Up to so many times as many where torch would have to gather rows of W before their product."""

_TILE_BYTES = 1 << 20
"""Rows that are gathered at a time: about what a core's own cache holds."""


def linear_rows(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``linear(x, scale[:, None] * weight[rows], bias)``. Pure.

    Args:
        x: Inputs ``(..., d_in)``, float32 or bfloat16, on the CPU.
        weight: ``(any, d_in)``, of the inputs' dtype or int8; each row contiguous.
        rows: Which of its rows, int64 ``(n,)``; None for all.
        scale: A factor per output, float32 ``(n,)``; None for 1.
        bias: Added per output, ``(n,)``.

    Returns:
        ``(..., n)``; for few inputs, and if there is a kernel, a sum in float32 rounded once.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        output: Tensor = _traced(x, weight, rows, scale, bias)
        return output
    inputs = _in_rows(x)
    most = MOST_INPUTS if rows is None else _GATHERED * MOST_INPUTS
    if inputs.shape[1] == weight.shape[1] and _can_read(inputs, weight, most):
        outputs = len(weight) if rows is None else len(rows)
        output = _by_kernel(find_kernel().linear, outputs, inputs, weight, (rows, scale, bias))
    else:
        output = _by_tiles(inputs, weight, rows, scale, bias)
    return output.view(*x.shape[:-1], output.shape[-1])


def sum_rows(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``x @ weight[rows] * scale + bias``: rows of a matrix, added up. Pure.

    Args:
        x: Inputs ``(..., n)``, float32 or bfloat16, on the CPU.
        weight: ``(any, d_out)``, of the inputs' dtype or int8; each row contiguous.
        rows: Which of its rows, int64 ``(n,)``; None for all.
        scale: A factor per output, float32 ``(d_out,)``; None for 1.
        bias: Added per output, ``(d_out,)``.

    Returns:
        ``(..., d_out)``; for few inputs, and if there is a kernel, a sum in float32 rounded once.
    """
    inputs = _in_rows(x)
    if not torch.compiler.is_compiling() and _can_read(inputs, weight, MOST_INPUTS):
        rest = (rows, scale, bias)
        output = _by_kernel(find_kernel().sum_rows, weight.shape[1], inputs, weight, rest)
    else:
        own = weight if rows is None else weight.index_select(0, rows)
        output = _multiply(inputs, own.T, scale, bias)
    return output.view(*x.shape[:-1], output.shape[-1])


def _in_rows(x: Tensor) -> Tensor:
    """Return inputs ``(..., width)`` as a contiguous matrix."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _can_read(x: Tensor, weight: Tensor, most: int) -> bool:
    """Whether the kernel is there, knows the dtypes, may read all, and inputs are few enough."""
    return (
        len(x) <= most
        and not torch.is_autocast_enabled("cpu")
        and type(weight) in (Tensor, nn.Parameter)
        and x.layout is weight.layout is torch.strided
        and x.dtype in INPUT_DTYPES
        and weight.dtype in (x.dtype, torch.int8)
        and weight.stride(1) == 1
        and x.device.type == weight.device.type == "cpu"
        and not isinstance(find_kernel(), NativeError)
    )


def _by_kernel(
    function: Any, n: int, x: Tensor, weight: Tensor, rest: tuple[Tensor | None, ...]
) -> Tensor:
    """Call a function of the library; ``n`` outputs, ``rest`` is rows, scale and bias."""
    output = x.new_empty(len(x), n)
    rows, scale, bias = rest
    rows = None if rows is None else rows.to(torch.int64).contiguous()
    scale, bias = _vector(scale, n, torch.float32), _vector(bias, n, x.dtype)
    failed = function(
        weight.data_ptr(),
        WEIGHT_DTYPES.index(weight.dtype),
        weight.stride(0),
        _address(rows),
        _address(scale),
        _address(bias),
        x.data_ptr(),
        INPUT_DTYPES.index(x.dtype),
        output.data_ptr(),
        len(x),
        n,
        x.shape[1],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(
            f"The kernel got no memory for the sums of {len(x)} x {n} outputs. Take a smaller "
            "batch, or call model.set_executor('compact')."
        )
    return output


def _vector(values: Tensor | None, n: int, dtype: torch.dtype) -> Tensor | None:
    """Return values as the kernel reads them; a single one is repeated, as torch does."""
    return None if values is None else values.to(dtype).expand(n).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _by_tiles(
    x: Tensor, weight: Tensor, rows: Tensor | None, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    if rows is None and scale is None and not _is_emulated(x, weight):
        return functional.linear(x, weight, bias)
    n = len(weight) if rows is None else len(rows)
    size = max(1, _TILE_BYTES // (max(1, weight.shape[1]) * x.element_size()))
    parts = []
    for start in range(0, max(n, 1), size):
        some = slice(start, start + size)
        tile = weight[some] if rows is None else weight.index_select(0, rows[some])
        own = [None if vector is None else vector[some] for vector in (scale, bias)]
        parts.append(_multiply(x, tile, *own))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _multiply(x: Tensor, matrix: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``linear(x, matrix) * scale + bias`` as torch computes it."""
    if _is_emulated(x, matrix):
        return _multiply(x.float(), matrix, scale, bias).to(x.dtype)
    output = functional.linear(x, matrix.to(x.dtype))
    output = output if scale is None else output * scale.to(output.dtype)
    return output if bias is None else output + bias.to(output.dtype)


def _is_emulated(x: Tensor, matrix: Tensor) -> bool:
    """Whether a product in the inputs' dtype takes several times as long as in float32."""
    plain = x.device.type == "cpu" and x.layout is matrix.layout is torch.strided
    cast = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return plain and not cast and x.dtype in slow_dtypes()


@torch.library.custom_op("hf_sparse_pathways::linear_rows", mutates_args=())
def _traced(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return linear_rows(x, weight, rows, scale, bias)


@_traced.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) if rows is None else len(rows))

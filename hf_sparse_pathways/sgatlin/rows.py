"""Products and sums over selected rows of a table, without a copy of the rows.

Single-neuron experts take ``<u_i, x>`` and ``sum w_i v_i`` over a few rows of large tables. A copy
of the rows would take tokens x rows x d_model. ``embedding_bag`` sums weighted rows as it reads
them, and the kernel behind the gradient of its weights takes products of rows with a vector: these
two, and the one behind the gradient of its table, are the layer and its gradients.

One form for one token and for many: an expert is one row, so that there is no matrix product to win
by sorting pairs by expert, and then the tokens' rows would be copied instead of the experts', as
many (``benchmarks/sgatlin.py`` has what copying rows takes).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_SUM = 0
"""``embedding_bag``'s number for its mode."""

_NO_PADDING = -1


def sum_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return each token's weighted sum of rows.

    Args:
        table: ``(rows, width)``.
        index: int64 ``(tokens, chosen)``.
        weights: Of the table's dtype, ``(tokens, chosen)``.

    Returns:
        ``(tokens, width)``.
    """
    return functional.embedding_bag(index, table, per_sample_weights=weights, mode="sum")


def multiply_rows(table: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Return the products of each token's rows with its vector.

    Args:
        table: ``(rows, width)``.
        index: int64 ``(tokens, chosen)``.
        x: Of the table's dtype, ``(tokens, width)``.

    Returns:
        ``(tokens, chosen)``.
    """
    apply: Any = _MultiplyRows.apply
    return apply(table, index, x)


class _MultiplyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, x)
        starts, tokens, _ = _bags(index)
        product = torch.ops.aten._embedding_bag_per_sample_weights_backward
        flat = index.reshape(-1)
        products: Tensor = product(x.contiguous(), table, flat, starts, tokens, _SUM, _NO_PADDING)
        return products.view(index.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, index, x = ctx.saved_tensors
        of_table = of_x = None
        if ctx.needs_input_grad[0]:
            of_table = _add_rows(x, index, grad, len(table))
        if ctx.needs_input_grad[2]:
            of_x = sum_rows(table, index, grad.contiguous())
        return of_table, None, of_x


def _add_rows(x: Tensor, index: Tensor, weights: Tensor, rows: int) -> Tensor:
    """Return a table with each token's vector, weighted, added to each of its rows.

    Args:
        x: ``(tokens, width)``.
        index: int64 ``(tokens, chosen)``.
        weights: ``(tokens, chosen)``.
        rows: Of the table.
    """
    starts, tokens, sizes = _bags(index)
    add = torch.ops.aten._embedding_bag_dense_backward
    flat, largest = index.reshape(-1), starts.new_empty(0)
    by_frequency = False
    return add(
        x.contiguous(),
        flat,
        tokens,
        sizes,
        largest,
        rows,
        by_frequency,
        _SUM,
        weights.reshape(-1),
        _NO_PADDING,
    )


def _bags(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each token's rows begin, the token of each row, and how many each token has."""
    tokens, chosen = index.shape
    starts = torch.arange(tokens, device=index.device) * chosen
    token = torch.arange(tokens, device=index.device).repeat_interleave(chosen)
    return starts, token, torch.full_like(starts, chosen)

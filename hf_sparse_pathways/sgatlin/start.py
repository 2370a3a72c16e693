"""A sgatlin layer begun as the best linear map that its channels can hold, in closed form.

All experts of a channel start alike, ``u_c`` and ``v_c``: whichever of them a token gets, the layer
is ``sum_c g_c(x) <u_c, x> v_c``, where ``g_c`` sums the scores of a token's experts. Of all linear
maps of rank ``n_channels`` the one of least squared error gives the ``u_c`` (reduced-rank
regression); with them, and what the router gives, the ``v_c`` are least squares again. Training
then moves the experts apart, since each sees the gradient of its own tokens only.

Source: reduced-rank regression, Izenman 1975.
"""

import torch
from torch import Tensor

from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN

RIDGE = 1e-4
"""In mean squares of a regressor."""


@torch.no_grad()
def start_linear(layer: SgatlinFFN, x: Tensor, y: Tensor) -> None:
    """Begin a layer as the best linear map of its rank, in place; the router stays as it is.

    Args:
        layer: Any; of more channels than ``d_model`` those beyond begin with nothing to give.
        x: Inputs, ``(tokens, d_model)``.
        y: The outputs that are wanted, of the same shape.
    """
    inputs, outputs = x.double(), y.double()
    linear = solve_ridge(inputs, outputs)
    explained = torch.linalg.eigh(linear.T @ (inputs.T @ inputs) @ linear).eigenvectors
    channels = min(layer.config.n_channels, layer.d_model)
    u = (linear @ explained.flip(1)[:, :channels]).T
    gates = layer.route(x)[0][:, :channels].double().sum(-1)
    v = solve_ridge(gates * (inputs @ u.T), outputs)
    balance = (v.norm(dim=1) / u.norm(dim=1)).sqrt()[:, None]
    layer.u[:channels] = (u * balance)[:, None].to(layer.u.dtype)
    layer.v[:channels] = (v / balance)[:, None].to(layer.v.dtype)
    layer.v[channels:] = 0.0


def solve_ridge(x: Tensor, y: Tensor) -> Tensor:
    """Return the matrix ``(inputs, outputs)`` of least squared error, with a small ridge.

    Args:
        x: float64 ``(tokens, inputs)``.
        y: float64 ``(tokens, outputs)``.
    """
    gram = x.T @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, x.T @ y)

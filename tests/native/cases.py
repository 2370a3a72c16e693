"""Products to compute, and what they are."""

import torch
from torch.nn import functional

DTYPES = (torch.float32, torch.bfloat16)


def make_case(n, k, m, dtype, weight_dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    height = n + 11
    if weight_dtype == torch.int8:
        weight = torch.randint(-127, 128, (height, k), generator=generator, dtype=torch.int8)
    else:
        weight = normal(height, k).to(weight_dtype)
    rows = torch.randperm(height, generator=generator)[:n].sort().values
    return normal(m, k).to(dtype), weight, rows, normal(n).abs() + 0.1, normal(n).to(dtype)


def in_float64(x, weight, rows, scale, bias):
    """The same in float64."""
    chosen = (weight if rows is None else weight[rows]).double()
    if scale is not None:
        chosen = chosen * scale[:, None].double()
    return functional.linear(x.double(), chosen, None if bias is None else bias.double())


def is_close(found, expected):
    limit = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[found.dtype]
    return (found.double() - expected).abs().max() <= limit * expected.abs().max()


def is_rounded_once(found, expected):
    """Whether nothing is lost but what the last rounding, and sums in float32, take."""
    allowed = torch.finfo(found.dtype).eps / 2 * expected.abs() + 1e-5 * expected.abs().max()
    return bool(((found.double() - expected).abs() <= allowed).all())

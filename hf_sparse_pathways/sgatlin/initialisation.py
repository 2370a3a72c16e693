"""How the layers' weights begin: truncated normal, scaled by what each output sums over."""

import math

from torch import Tensor, nn

_TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal that is cut off at two."""


def scale_variance(weight: Tensor, fan_in: int) -> None:
    """Fill a tensor, in place, with a truncated normal of variance ``1 / fan_in``.

    It is cut off at two standard deviations of the normal, whose own is that much larger.
    """
    fill(weight, math.sqrt(1.0 / fan_in) / _TRUNCATED_STD)


def fill(weight: Tensor, std: float) -> None:
    """Fill a tensor, in place, with a normal that is cut off at two standard deviations."""
    nn.init.trunc_normal_(weight, 0.0, std, -2.0 * std, 2.0 * std)

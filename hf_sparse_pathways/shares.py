"""Fractions as users write and read them."""

from numbers import Real

_LEAST = 1e-9
"""What is nearer to nothing or all than this differs by rounding only."""


def format_share(share: float, digits: int = 0) -> str:
    """Render a fraction as a percentage: 0 % and 100 % stand for nothing and all alone.

    Args:
        share: In [0, 1].
        digits: Behind the point; as many more are shown as tell it from nothing and all.
    """
    text = f"{share:.{digits}%}"
    while _LEAST < share < 1.0 - _LEAST and float(text.removesuffix("%")) in (0.0, 100.0):
        digits += 1
        text = f"{share:.{digits}%}"
    return text


def is_number(value: object) -> bool:
    """Whether a value is a real number, and not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool)

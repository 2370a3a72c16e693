"""Sizes of memory as users write them."""

import re

from hf_sparse_pathways.errors import PathwaysError

MAX_MEMORY = "4GB"
"""Default bound of the Gram matrices that are in memory at a time."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_memory(size: int | str) -> int:
    """Return a number of bytes from ``"4GB"``, ``"500 MB"``, ``"2GiB"`` or a number.

    Raises:
        PathwaysError: It is no size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise PathwaysError(f"{size!r} is no size of memory. Write '4GB', '500MB' or bytes.")
    unit = match[2].upper()
    factor = 1024 ** " KMGT".index(unit) if match[3] and unit else _UNITS[unit]
    return int(float(match[1]) * factor)


def format_memory(size: int) -> str:
    """Render a number of bytes with three digits and a unit."""
    for unit in ("TB", "GB", "MB", "kB"):
        factor = _UNITS[unit[0].upper()]
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"

"""From what a caller names (a domain, one per row, None, nothing) to what the leaves read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError


class Unset:
    """The type of ``UNSET``: no domain was named, so the ambient or default one holds."""

    def __repr__(self) -> str:
        return "UNSET"

    def __reduce__(self) -> str:
        """Pickle and copy as the one instance."""
        return "UNSET"


UNSET = Unset()


def resolve_domain(
    domain: str | Sequence[str | None] | Tensor | None,
    names: Sequence[str],
    controls: Sequence[str] = (),
) -> int | Tensor | None:
    """Turn domain names into indices.

    Args:
        domain: One name for all rows, None for dense, a list with one of either per row, or an
            int64 tensor of indices with -1 for dense.
        names: The domains, in the order of their indices.
        controls: Pathways beside them, whose indices follow; taken, but no domains.

    Returns:
        An index, None for dense, or an int64 tensor ``(rows,)``.

    Raises:
        UnknownNameError: A name is not known.
        PathwaysError: The value is none of the above.
    """
    if domain is None:
        return None
    if isinstance(domain, (str, bytes)):
        return _index(domain, names, controls)
    if isinstance(domain, Tensor):
        return _checked_indices(domain, len(names) + len(controls))
    if isinstance(domain, Sequence) and len(domain) > 0:
        indices = [_index(name, names, controls) for name in domain]
        return torch.tensor(indices, dtype=torch.int64)
    raise PathwaysError(
        f"domain={domain!r} does not fit. Give a domain's name, None for dense, or a list "
        f"with one of either per row. Known: {', '.join(map(repr, names)) or 'none'}."
    )


def fit_rows(rows: Tensor, batch: int, *, expand: bool) -> int | Tensor | None:
    """Bring per-row indices to a batch; one index (or None) if all rows agree.

    Args:
        rows: int64 ``(rows,)``, -1 for dense.
        batch: Rows of the batch.
        expand: Whether a batch of a multiple of the rows is fine, each row repeated in place, as
            ``generate`` lays out beams and returned sequences.

    Raises:
        PathwaysError: The lengths do not fit.
    """
    if batch != len(rows):
        if not expand or batch % len(rows):
            raise PathwaysError(
                f"domain has {len(rows)} entries, but the batch has {batch} rows. Give one "
                "entry per row, or a single name for all."
            )
        rows = rows.repeat_interleave(batch // len(rows))
    if torch.compiler.is_compiling():  # values are not known while a graph is traced
        return rows
    first = int(rows[0])
    if bool((rows == first).all()):
        return None if first < 0 else first
    return rows


def _index(name: Any, names: Sequence[str], controls: Sequence[str]) -> int:
    if name is None:
        return -1
    known = [*names, *controls]
    if name not in known:
        raise UnknownNameError("domain", name, names)
    return known.index(name)


def _checked_indices(rows: Tensor, count: int) -> Tensor:
    valid = rows.dim() == 1 and rows.numel() > 0 and not rows.is_floating_point()
    if valid and torch.compiler.is_compiling():  # values are not known while a graph is traced
        return rows.long()
    if not valid or bool(((rows < -1) | (rows >= count)).any()):
        raise PathwaysError(
            f"domain as a tensor has to hold one index per row, from -1 (dense) to {count - 1}; "
            f"got {rows.dtype} of shape {tuple(rows.shape)}."
        )
    return rows.long()

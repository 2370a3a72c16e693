"""Which waiting requests to run together.

A decoding step costs about the same with few rows as with many, so that as few batches as possible
are the fastest; among those, rows of one domain compute the fewest neurons. Full batches of one
domain come first, then what is left over of the domains, packed into as few batches as it takes
with as few domains in each as first-fit decreasing finds.
"""

from collections.abc import Sequence

from hf_sparse_pathways.errors import PathwaysError


def group_rows(domains: Sequence[str | None], max_batch: int) -> list[list[int]]:
    """Group requests into batches. Pure.

    Args:
        domains: Each request's domain, in the order of arrival.
        max_batch: Most rows of a batch.

    Returns:
        Batches of indices into ``domains``; every index once, in order of arrival within a domain.

    Raises:
        PathwaysError: ``max_batch`` is not positive.
    """
    if max_batch < 1:
        raise PathwaysError(f"max_batch has to be positive, got {max_batch}.")
    waiting: dict[str | None, list[int]] = {}
    for index, domain in enumerate(domains):
        waiting.setdefault(domain, []).append(index)
    full, left = [], []
    for rows in waiting.values():
        whole = len(rows) - len(rows) % max_batch
        full += [rows[start : start + max_batch] for start in range(0, whole, max_batch)]
        left.append(rows[whole:])
    return full + _pack(left, max_batch)


def _pack(groups: list[list[int]], size: int) -> list[list[int]]:
    """Put groups smaller than a batch into the fewest batches, splitting only what has to be."""
    fewest = -(-sum(map(len, groups)) // size)
    batches: list[list[int]] = [[] for _ in range(fewest)]
    split = []
    for group in sorted(groups, key=len, reverse=True):
        room = [batch for batch in batches if len(batch) + len(group) <= size]
        if room:
            room[0].extend(group)
        else:
            split.append(group)
    for row in (row for group in split for row in group):
        next(batch for batch in batches if len(batch) < size).append(row)
    return [batch for batch in batches if batch]

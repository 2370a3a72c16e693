"""Two kinds of evidence for what a text is of, each of which says which domains it may be of.

``tokens``: the domain of which the tokens say most, if they say as much as in the domain's held-out
text and more than in the model's own, and no other domain comes near. That is blind to order: a
manual that has the words of law is law to it. ``pairs``: the domains of which the text shares as
many pairs of neighbouring tokens as their held-out text does. A router takes what all its kinds
agree on; another kind is a function and a line here.
"""

from collections.abc import Callable, Mapping

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.pathways.signature import Reading, Signature, at_length

Kind = Callable[[Mapping[str, Signature], Mapping[str, Reading]], set[str]]
"""From domains' signatures, and what a text says of each, to the domains that it may be of."""


def admit_by_tokens(
    signatures: Mapping[str, Signature], readings: Mapping[str, Reading]
) -> set[str]:
    """Admit the domain that the tokens speak for, or none."""
    best = nearest(readings)
    own, said = signatures[best], readings[best]
    usual = said.score >= at_length(own.least_scores, said.count)
    alone = all(
        said.nats - readings[name].nats >= other.margin(own, said.count)
        for name, other in signatures.items()
        if name != best
    )
    return {best} if usual and alone else set()


def admit_by_pairs(
    signatures: Mapping[str, Signature], readings: Mapping[str, Reading]
) -> set[str]:
    """Admit the domains whose text has the pairs of tokens; those of which none are known, too."""
    return {
        name
        for name, signature in signatures.items()
        if not signature.knows_pairs
        or readings[name].seen >= at_length(signature.least_seen, readings[name].count)
    }


KINDS: Mapping[str, Kind] = {"tokens": admit_by_tokens, "pairs": admit_by_pairs}


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Check names of kinds.

    Raises:
        UnknownNameError: There is none of a name.
        PathwaysError: There are no names at all.
    """
    if not kinds:
        raise PathwaysError(f"A router needs at least one kind of evidence: {', '.join(KINDS)}.")
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownNameError("kind of evidence", kind, KINDS)


def nearest(readings: Mapping[str, Reading]) -> str:
    """Return the domain that the tokens say most of."""
    return max(readings, key=lambda name: readings[name].nats)

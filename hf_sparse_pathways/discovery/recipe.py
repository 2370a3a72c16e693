"""How pathways are made: the choices of ``select`` as one value, with their defaults.

A *method* ranks the neurons of a block. ``"obs"`` does it by Optimal Brain Surgeon on the Gram
matrix (``obs.py``), block after block on what the pruned blocks before give (``sequential.py``);
every name in ``SCORES``, and a user's own function, by a score. The *compensation* repairs what the
kept neurons can (``repair.py``), and the *allocation* divides the budget over the blocks.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse_pathways.discovery.allocation import resolve_allocation
from hf_sparse_pathways.discovery.clustering import Clustering
from hf_sparse_pathways.discovery.grouping import Grouping
from hf_sparse_pathways.discovery.precision import PRECISIONS
from hf_sparse_pathways.discovery.repair import Repair
from hf_sparse_pathways.discovery.scores import SCORES, ScoreFunction
from hf_sparse_pathways.discovery.windows import check_seed
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError, named, option
from hf_sparse_pathways.shares import is_number

OBS = "obs"
MEASURED = ("auto", "sensitivity")
"""Allocations that run the model on validation text: ``planning.py``."""

ORDERS = ("auto", "sequential", "one-shot")
PARTS = ("none", "bias", "refit", "shared", "patch:RANK", "bypass:RANK")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How pathways are made.

    Attributes:
        method: ``"obs"``, or the name of a score.
        score: The score's function; None for ``"obs"``.
        allocation: ``"auto"``, or what divides the budget.
        compensation: As ``parse_compensation`` takes it.
        repair: What that means.
        ridge: Of the least squares, in units of the mean second moment; None if validation text
            decides.
        order: ``"sequential"`` or ``"one-shot"``, or ``"auto"`` for sequential where it can be.
        multiple: Widths are multiples of this.
        precision: Of the model's products while it runs over calibration text.
        seed: Of everything that is drawn.
        clustering: How each block's tokens are clustered, to get neurons of their own; None if
            they are not.
        skip: The share of kept neurons that a token skips, at most.
        grouping: How each block's neurons are divided into groups of which a token has some; None
            if they are not.
    """

    method: str
    score: ScoreFunction | None
    allocation: str | Callable[..., list[int]]
    compensation: str
    repair: Repair
    ridge: float | None
    order: str
    multiple: int
    precision: str
    seed: int
    clustering: Clustering | None = None
    skip: float = 0.0
    grouping: Grouping | None = None

    @property
    def routes(self) -> int:
        """Rows of each block's router, between clusters or groups; 1 where there is none."""
        routed = self.clustering or self.grouping
        return 1 if routed is None else routed.count

    def described(self) -> dict[str, Any]:
        """Return the recipe as JSON values, for the artefact."""
        named = self.allocation if isinstance(self.allocation, str) else "a user's function"
        return {
            "method": self.method,
            "allocation": named,
            "compensation": self.compensation,
            "ridge": self.repair.ridge,
            "order": self.order,
            "multiple": self.multiple,
            "precision": self.precision,
            "seed": self.seed,
            **({"clustering": asdict(self.clustering)} if self.clustering else {}),
            **({"skip": self.skip} if self.skip else {}),
            **({"mixture": asdict(self.grouping)} if self.grouping else {}),
        }


def make_recipe(  # noqa: PLR0913
    method: str | ScoreFunction,
    *,
    allocation: str | Callable[..., list[int]] | None = None,
    compensation: str | None = None,
    ridge: str | float = "auto",
    order: str = "auto",
    multiple: int = 1,
    precision: str = "model",
    seed: int = 0,
    clusters: int | Clustering = 1,
    skip: float = 0.0,
    mixture: int | Grouping | None = None,
) -> Recipe:
    """Return a recipe, with the method's defaults for what is not given.

    Raises:
        UnknownNameError: A name is unknown.
        PathwaysError: A number is out of range.
    """
    name, score = resolve_method(method)
    own = {OBS: ("auto", "refit+bias"), "flap": ("uniform", "bias")}
    usual = own.get(name, ("uniform", "none"))
    if allocation is None:
        allocation = usual[0]
    if allocation not in MEASURED:
        resolve_allocation(allocation)
    compensation = usual[1] if compensation is None else compensation
    if order not in ORDERS:
        raise UnknownNameError("order", order, ORDERS)
    check_seed(seed)
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    if type(multiple) is not int or multiple < 1:
        raise PathwaysError(f"multiple has to be a whole number of at least 1, got {multiple!r}.")
    if isinstance(ridge, str) and ridge != "auto":
        raise PathwaysError(f"ridge has to be 'auto' or a positive number, got {ridge!r}.")
    fixed = None if isinstance(ridge, str) else ridge
    _check_skip(skip, name, order)
    clustering = _resolve_clusters(clusters, name, order, seed)
    alone = {"clusters": clusters != 1, "skip": skip > 0, "multiple": multiple > 1}
    grouping = _resolve_mixture(mixture, name, order, seed, alone)
    repair = parse_compensation(compensation, Repair.ridge if fixed is None else fixed)
    if repair.shared and clustering is None:
        raise PathwaysError(
            f"compensation {compensation!r}: clusters have experts that could share a refit; give "
            f"{option('clusters')}, or write 'refit'."
        )
    return Recipe(
        method=name,
        score=score,
        allocation=allocation,
        compensation=compensation,
        repair=repair,
        ridge=fixed,
        order=_resolve_order(order, name, by_token=bool(clustering or grouping) or skip > 0),
        multiple=multiple,
        precision=precision,
        seed=seed,
        clustering=clustering,
        skip=float(skip),
        grouping=grouping,
    )


def _resolve_mixture(
    mixture: int | Grouping | None, method: str, order: str, seed: int, others: dict[str, bool]
) -> Grouping | None:
    """Return how neurons are divided into groups, if they are; they go with no other of these."""
    if mixture is None:
        return None
    wrong = [] if method == OBS else [named("method", method)]
    wrong += [named("order", order)] if order == "one-shot" else []
    wrong += [option(name) for name, given in others.items() if given]
    if wrong:
        raise PathwaysError(
            f"Neurons are divided into groups by {named('method', OBS)}, block after block: leave "
            f"out {' and '.join(wrong)}, or {option('mixture')}."
        )
    return mixture if isinstance(mixture, Grouping) else Grouping(count=mixture, seed=seed)


def _check_skip(skip: float, method: str, order: str) -> None:
    """Check how much is skipped by token, and that nothing is asked that does not go with it."""
    if not is_number(skip) or not 0.0 <= skip < 1.0:
        raise PathwaysError(
            f"{option('skip')} is the share of kept neurons that a token skips, in [0, 1); got "
            f"{skip!r}."
        )
    if not skip:
        return
    wrong = [] if method == OBS else [named("method", method)]
    wrong += [named("order", order)] if order == "one-shot" else []
    if wrong:
        raise PathwaysError(
            f"Neurons are skipped by token in pathways that {named('method', OBS)} makes block "
            f"after block: leave out {' and '.join(wrong)}, or {option('skip')}."
        )


def _resolve_order(order: str, method: str, *, by_token: bool) -> str:
    """Return the order, ``"auto"`` only where the model and its text decide."""
    if by_token:
        return "sequential"
    return "one-shot" if order == "auto" and method != OBS else order


def _resolve_clusters(
    clusters: int | Clustering, method: str, order: str, seed: int
) -> Clustering | None:
    """Return how tokens are clustered, if they are."""
    if type(clusters) is int and clusters == 1:
        return None
    if not isinstance(clusters, Clustering):
        clusters = Clustering(count=clusters, seed=seed)
    wrong = [] if method == OBS else [named("method", method)]
    wrong += [named("order", order)] if order == "one-shot" else []
    if wrong:
        raise PathwaysError(
            f"Clusters of tokens get neurons by {named('method', OBS)}, block after block: leave "
            f"out {' and '.join(wrong)}, or the clusters."
        )
    return clusters


def resolve_method(method: str | ScoreFunction) -> tuple[str, ScoreFunction | None]:
    """Return a method's name, and its score's function if it has one.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if callable(method):
        return getattr(method, "__name__", "a user's function"), method
    if method == OBS:
        return OBS, None
    if method not in SCORES:
        raise UnknownNameError("method", method, [OBS, *SCORES])
    return method, SCORES[method]


def parse_compensation(text: str, ridge: float = Repair.ridge) -> Repair:
    """Return what ``"refit+bias+bypass:64"`` and the like ask for.

    Args:
        text: Parts joined by ``+``: ``none``, ``bias``, ``refit``, ``patch:RANK`` (a refit stored
            with that rank), ``shared`` (one refit for all experts of a block), ``bypass:RANK``.
        ridge: Of the least squares, in units of the mean second moment.

    Raises:
        PathwaysError: A part is unknown, or a number is out of range.
    """
    if not isinstance(text, str):
        raise PathwaysError(f"compensation has to be a text like 'refit+bias', got {text!r}.")
    if not 0.0 < ridge < 1e6:
        raise PathwaysError(f"ridge has to be positive, got {ridge!r}.")
    ranks = {"patch": 0, "bypass": 0}
    plain = set()
    for part in text.split("+"):
        match = re.fullmatch(r"(patch|bypass):(\d+)", part.strip())
        if match and int(match[2]) > 0 and not ranks[match[1]]:
            ranks[match[1]] = int(match[2])
        elif part.strip() in ("none", "bias", "refit", "shared"):
            plain.add(part.strip())
        else:
            raise PathwaysError(
                f"compensation {text!r} does not fit at {part!r}. Join parts of "
                f"{', '.join(PARTS)} with '+', as in 'refit+bias'."
            )
    if "none" in plain and (len(plain) > 1 or any(ranks.values())):
        raise PathwaysError(f"compensation {text!r}: 'none' stands alone.")
    if "shared" in plain and ("refit" in plain or any(ranks.values())):
        raise PathwaysError(
            f"compensation {text!r}: 'shared' is the refit of all experts and stands alone, or "
            "with 'bias'."
        )
    return Repair(
        ridge=ridge,
        refit=bool({"refit", "shared"} & plain) or ranks["patch"] > 0,
        bias="bias" in plain,
        bypass_rank=ranks["bypass"],
        patch_rank=ranks["patch"] or None,
        shared="shared" in plain,
    )

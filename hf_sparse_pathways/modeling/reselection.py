"""A pathway selected anew, with the same number of neurons in every block.

The artefact has no statistics, so this takes a profile. What the pathway was made by is kept: its
method, ridge, order and seed, the share of the FFN's FLOPs, and of its compensation what a plain
FFN has a place for. What healing has changed is lost.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_sparse_pathways.discovery.allocation import BlockCosts, Budget
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.recipe import OBS, ORDERS, parse_compensation
from hf_sparse_pathways.discovery.scores import SCORES
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.modeling.baking import find_form, has_place_for_bias
from hf_sparse_pathways.pathways.pathway import Pathways

logger = logging.getLogger(__name__)


def reselect(model: Any, domain: str, profile: Profile, *, multiple_of: int = 1) -> Pathways:
    """Return pathways with one domain, as wide as it was, equally in every block. Pure.

    Args:
        model: A model with pathways.
        domain: The domain.
        profile: Of the dense model, with that domain; others are left out.
        multiple_of: Widths are rounded up to multiples of this.

    Raises:
        UnknownNameError: The model or the profile has no such domain.
        MismatchError: The profile was taken from another model.
        UnsupportedModelError: The architecture has no form with other widths.
        PathwaysError: The blocks would be no narrower than they are.
    """
    pathways = model.pathways.subset([domain])
    dense, taken = model.to_dense(), profile.subset([domain])
    shapes = pathways.base.blocks
    share = pathways.flops(domain)
    widths = [-(-round(share * shape.d_ff) // multiple_of) * multiple_of for shape in shapes]
    find_form(dense, widths, [False] * len(widths), multiple_of)  # before minutes are spent
    made = pathways[domain].provenance
    if "healing" in made:
        logger.warning("What healing has changed is lost when neurons are selected anew.")

    def uniform_width(blocks: Sequence[BlockCosts], budget: Budget) -> list[int]:  # noqa: ARG001
        return widths

    computed = sum(w * shape.flops_per_neuron for w, shape in zip(widths, shapes, strict=True))
    selected = select(
        dense,
        taken,
        sparsity=max(0.0, 1.0 - computed / sum(shape.dense_flops for shape in shapes)),
        allocation=uniform_width,
        controls=False,
        **_repeated(made, place=has_place_for_bias(dense)),
    )
    return replace(selected, base=pathways.base)


def _repeated(made: Mapping[str, Any], *, place: bool) -> dict[str, Any]:
    """Return how a pathway was made, as far as that can be done again.

    Args:
        made: Its provenance.
        place: Whether the architecture has a place for a bias.
    """
    recipe: dict[str, Any] = {"seed": made.get("seed", 0)}
    if made.get("method") in (OBS, *SCORES):
        recipe["method"] = made["method"]
    if made.get("order") in ORDERS:
        recipe["order"] = made["order"]
    if made.get("ridge") is not None:
        recipe["ridge"] = made["ridge"]
    if made.get("compensation") is not None:
        recipe["compensation"] = _fitting(made["compensation"], place=place)
    elif not place:
        recipe["compensation"] = "refit"
    return recipe


def _fitting(compensation: str, *, place: bool) -> str:
    """Return the parts of a compensation that a plain FFN has a place for."""
    repair = parse_compensation(compensation)
    parts = ["refit"] * repair.refit + ["bias"] * (repair.bias and place)
    return "+".join(parts) or "none"

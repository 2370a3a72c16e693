"""From scores to pathways: which neurons stay, under a sparsity or the paper's percentile rule.

Each domain's neurons are ranked block by block by an importance score. Either a given fraction of
every block is removed (uniform, or one fraction per block), or every neuron below a percentile of
the domain's scores is, taken over the block or over the whole model.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.discovery.profiles import DomainProfile, Profile
from hf_sparse_pathways.discovery.scores import (
    ScoreFunction,
    ScoreInput,
    check_scores,
    resolve_score,
)
from hf_sparse_pathways.discovery.statistics import check_statistics
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import POOLED, Pathway, Pathways

DEFAULT_SPARSITY = 0.3
POOLS = ("layer", "model")

Rule = Callable[[list[Tensor]], list[Tensor]]
"""From one score tensor per block to one keep mask per block."""


def select(  # noqa: PLR0913
    model: nn.Module,
    profile: Profile,
    *,
    sparsity: float | Sequence[float] | None = None,
    percentile: float | None = None,
    pool: str = "layer",
    score: str | ScoreFunction | None = None,
    seed: int = 0,
) -> Pathways:
    """Choose each domain's neurons. The model is only read.

    With two domains or more, the ``pooled`` control is chosen by the same rule from all domains'
    statistics together.

    Args:
        model: The profiled model.
        profile: Its activation profile.
        sparsity: Fraction of neurons to remove, in [0, 1): one for every block, or one per block.
            By default 0.3.
        percentile: Instead of a sparsity: remove neurons that score below this percentile of the
            domain's scores, in [0, 100).
        pool: What the percentile is taken over, ``"layer"`` (one FFN block) or ``"model"``.
        score: A name in ``SCORES``, or a function of a ``ScoreInput``. By default ``"wanda"``
            with a sparsity, and ``"mean_abs"``, as in the paper, with a percentile.
        seed: For scores that draw numbers.

    Raises:
        MismatchError: The profile was taken from another model.
        PathwaysError: A number is out of range, both rules were given, or the profile holds NaN.
        UnknownNameError: An unknown score or pool.

    Source:
        The percentile rule: A. Young 2026, "Sparse Pathways" (negative selection at p50). The paper
        does not say what the percentile is pooled over, hence ``pool``. A block always keeps at
        least its best neuron.
    """
    profile.base.check_same(BaseModel.of(model))
    rule, described = make_rule(sparsity, percentile, pool, len(profile.base.blocks))
    name, function = resolve_score(score or ("wanda" if percentile is None else "mean_abs"))
    recipe = {"method": "score", "score": name, **described, "seed": seed}
    chosen = dict(profile.by_domain)
    controls = {POOLED: profile.pooled()} if len(chosen) > 1 else {}

    def pathway(domain: str, statistics: DomainProfile) -> Pathway:
        scores = _score_blocks(model, domain, statistics, (name, function), seed)
        return Pathway.from_keep(rule(scores), {**recipe, "text": dict(statistics.provenance)})

    return Pathways(
        base=profile.base,
        by_domain={domain: pathway(domain, given) for domain, given in chosen.items()},
        controls={control: pathway(control, given) for control, given in controls.items()},
    )


def _score_blocks(
    model: nn.Module,
    domain: str,
    profile: DomainProfile,
    score: tuple[str, ScoreFunction],
    seed: int,
) -> list[Tensor]:
    name, function = score
    scores = []
    for index, block in enumerate(find_blocks(model)):
        check_statistics(domain, block.name, profile.blocks[index])
        weight: Any = block.outgoing.weight
        down = (weight.T if isinstance(block.outgoing, Conv1D) else weight).detach().float().cpu()
        given = ScoreInput(
            statistics=profile.blocks[index],
            down=down,
            generator=_generator(seed, domain, index),
        )
        scores.append(check_scores(name, function(given), block.d_ff))
    return scores


def _generator(seed: int, domain: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{domain}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def make_rule(
    sparsity: float | Sequence[float] | None, percentile: float | None, pool: str, blocks: int
) -> tuple[Rule, dict[str, Any]]:
    """Return the rule, and its description for the artefact."""
    if percentile is not None:
        if sparsity is not None:
            raise PathwaysError("Give a sparsity or a percentile, not both.")
        return _percentile_rule(percentile, pool), {"percentile": percentile, "pool": pool}
    fractions = check_sparsity(DEFAULT_SPARSITY if sparsity is None else sparsity, blocks)

    def rule(scores: list[Tensor]) -> list[Tensor]:
        return [keep_best(block, s) for block, s in zip(scores, fractions, strict=True)]

    uniform = len(set(fractions)) == 1
    return rule, {"sparsity": fractions[0] if uniform else fractions}


def check_sparsity(sparsity: float | Sequence[float], blocks: int) -> list[float]:
    """Return one sparsity per block.

    Raises:
        PathwaysError: One is outside [0, 1), or their number is not that of the blocks.
    """
    if hasattr(sparsity, "tolist"):  # a tensor or an array
        sparsity = sparsity.tolist()
    fractions = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity] * blocks
    if len(fractions) != blocks:
        raise PathwaysError(
            f"{len(fractions)} sparsities were given for {blocks} FFN blocks. Give one per block, "
            "or a single one."
        )
    for value in fractions:
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not number or not 0.0 <= value < 1.0:
            raise PathwaysError(
                f"sparsity has to be in [0, 1), the fraction of neurons removed; got {value!r}."
            )
    return [float(value) for value in fractions]


def keep_best(scores: Tensor, sparsity: float) -> Tensor:
    """Return the keep mask ``(d_ff,)`` of the best ``d_ff - round(sparsity * d_ff)`` neurons."""
    count = max(1, len(scores) - round(sparsity * len(scores)))
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.topk(count).indices] = True
    return keep


def _percentile_rule(percentile: float, pool: str) -> Rule:
    if pool not in POOLS:
        raise UnknownNameError("pool", pool, POOLS)
    number = isinstance(percentile, (int, float)) and math.isfinite(percentile)
    if not number or not 0.0 <= percentile < 100.0:
        raise PathwaysError(f"percentile has to be in [0, 100), got {percentile!r}.")

    def threshold(scores: Tensor) -> Tensor:
        ranked = scores.sort().values  # quantile() refuses more than 2**24 values
        return ranked[min(math.ceil(percentile * len(ranked) / 100), len(ranked) - 1)]

    def rule(scores: list[Tensor]) -> list[Tensor]:
        common = threshold(torch.cat(scores)) if pool == "model" else None
        masks = []
        for block in scores:
            keep = block >= (threshold(block) if common is None else common)
            keep[block.argmax()] = True
            masks.append(keep)
        return masks

    return rule

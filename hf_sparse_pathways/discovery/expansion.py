"""Sparse Expansion: clusters of tokens without any label, an expert for each, in one call.

Source: Sawmya et al. 2025, "Sparse Expansion", arXiv:2405.15756. There the experts are one-shot
pruned copies of the weights (``"copies"``); ours keep some of the block's neurons each, with a
repair (``"neurons"``).
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from hf_sparse_pathways.discovery.clustering import Clustering
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.pruned_copies import CopyRecipe, make_copies
from hf_sparse_pathways.discovery.recipe import OBS
from hf_sparse_pathways.discovery.selection import decide, select
from hf_sparse_pathways.discovery.sparsegpt import UNSTRUCTURED, parse_pattern
from hf_sparse_pathways.discovery.text import TextSource
from hf_sparse_pathways.discovery.windows import check_seed
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError, UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathways

EXPANDED = "expanded"
"""Name of the domain that stands for all of the text."""

NEURONS, COPIES = "neurons", "copies"
EXPERTS = (NEURONS, COPIES)


def expand(  # noqa: PLR0913
    model: nn.Module,
    tokenizer: Any,
    text: TextSource,
    *,
    clusters: int = 16,
    sparsity: float = 0.5,
    pca: int | None = None,
    experts: str = NEURONS,
    pattern: str = UNSTRUCTURED,
    **options: Any,
) -> Pathways:
    """Return pathways of one domain, ``"expanded"``, whose blocks route each token to an expert.

    Args:
        model: A causal LM; it is left as it was.
        tokenizer: Its tokenizer.
        text: Any text, of all kinds that the model shall read (see ``read_documents``).
        clusters: Experts of each block; 1 for the same neurons, or weights, of all tokens.
        sparsity: Fraction of the FFN's FLOPs to remove, routing included, in [0, 1); of copies the
            fraction of every leaf's weights.
        pca: Principal components of a block's input; by default a sixteenth of its width.
        experts: ``"neurons"``: each keeps some neurons, with a repair; less is computed.
            ``"copies"``: each is the block pruned weight by weight by SparseGPT, as in the paper.
            Copies are computed as dense matrices, and take the FFN's size in bytes each.
        pattern: Of copies: ``"unstructured"``, or ``"2:4"`` and the like, which keep so many
            weights of every so many.
        options: ``max_tokens``, ``max_length``, ``batch_size``, ``validation_tokens``,
            ``validation_share``, ``max_memory``, ``work_folder`` as in ``profile``; ``precision``
            and ``seed`` as in both; others, for neurons, as in ``select``.

    Raises:
        PathwaysError: As ``profile`` and ``select``; or there is no such pattern, it removes
            another fraction, or an option that copies do not have.
        UnknownNameError: There are no such experts.
        UnsupportedModelError: The layers cannot be run one at a time; or, for copies, weights are
            quantised.
    """
    if experts not in EXPERTS:
        raise UnknownNameError("kind of experts", experts, EXPERTS)
    if experts == NEURONS and pattern != UNSTRUCTURED:
        raise PathwaysError(
            f"pattern={pattern!r} is of single weights, and experts={NEURONS!r} lose whole "
            f"neurons: leave it out, or choose experts={COPIES!r}."
        )
    for name in options:
        if name not in (*_PROFILING, *_SELECTING):
            raise UnknownNameError("option", name, (*_PROFILING, *_SELECTING))
    check_seed(options.get("seed", 0))
    own = {name: options.pop(name) for name in _PROFILING if name in options}
    if clusters == 1 and pca is not None:
        raise PathwaysError(
            f"pca={pca!r} is about clusters of tokens, and clusters=1 makes none: leave it out."
        )
    clustering = None if clusters == 1 else _clustering(clusters, pca, options)
    _check_model(model)
    shared = {name: options[name] for name in ("precision", "seed") if name in options}
    if experts == NEURONS:
        _check_selection(model, {**options, "sparsity": sparsity, "clusters": clustering or 1})
        taken = profile(model, tokenizer, {EXPANDED: text}, inputs=False, **own, **shared)
        return select(model, taken, sparsity=sparsity, clusters=clustering or 1, **options)
    _check_options({*options} - {*shared})
    recipe = CopyRecipe(
        pattern=parse_pattern(pattern, sparsity),
        clustering=clustering,
        precision=options.get("precision", "model"),
    )
    taken = profile(model, tokenizer, {EXPANDED: text}, grams=False, **own, **shared)
    return make_copies(model, taken, recipe)


def _clustering(clusters: int, pca: int | None, options: Mapping[str, Any]) -> Clustering:
    return Clustering(count=clusters, dimensions=pca, seed=options.get("seed", 0))


def _check_model(model: nn.Module) -> None:
    if not find_blocks(model):
        raise UnsupportedModelError(
            f"The FFNs of this {BaseModel.of(model).model_type} model are routed experts alone, "
            "which are chosen per token already. To keep some of them, take its profile, and call "
            "sp.select(model, profile, experts=0.5)."
        )


def _check_selection(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse before the text is run what ``select`` would refuse after that."""
    usual = {name: one.default for name, one in signature(select).parameters.items()}
    method = "mean_abs" if options.get("percentile") is not None else OBS
    decide(BaseModel.of(model), [EXPANDED], method, {**usual, **options})


def _check_options(others: set[str]) -> None:
    if others:
        raise PathwaysError(
            f"experts={COPIES!r} are pruned by SparseGPT and have no {', '.join(sorted(others))}: "
            f"leave that out, or choose experts={NEURONS!r}."
        )


_PROFILING = (
    "max_tokens",
    "max_length",
    "batch_size",
    "validation_tokens",
    "validation_share",
    "max_memory",
    "work_folder",
)

_OWN = ("model", "profile", "sparsity", "clusters", "experts")

_SELECTING = tuple(name for name in signature(select).parameters if name not in _OWN)

"""Sparse Expansion: clusters of tokens without any label, an expert for each, in one call.

Source: Sawmya et al. 2025, "Sparse Expansion", arXiv:2405.15756. There the experts are one-shot
pruned copies of the weights; here each keeps some of the block's neurons, with a repair.
"""

from typing import Any

from torch import nn

from hf_sparse_pathways.discovery.clustering import Clustering
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.text import TextSource
from hf_sparse_pathways.pathways.pathway import Pathways

EXPANDED = "expanded"
"""Name of the domain that stands for all of the text."""


def expand(
    model: nn.Module,
    tokenizer: Any,
    text: TextSource,
    *,
    clusters: int = 16,
    sparsity: float = 0.5,
    pca: int | None = None,
    **options: Any,
) -> Pathways:
    """Return pathways of one domain, ``"expanded"``, whose blocks route each token to an expert.

    Args:
        model: A causal LM; it is left as it was.
        tokenizer: Its tokenizer.
        text: Any text, of all kinds that the model shall read (see ``read_documents``).
        clusters: Experts of each block.
        sparsity: Fraction of the FFN's FLOPs to remove, routing included, in [0, 1).
        pca: Principal components of a block's input; by default a sixteenth of its width.
        options: ``max_tokens``, ``max_length``, ``batch_size``, ``validation_tokens``,
            ``validation_share``, ``max_memory``, ``work_folder`` as in ``profile``; ``precision``
            and ``seed`` as in both; others as in ``select``.

    Raises:
        PathwaysError: As ``profile`` and ``select``.
    """
    clustering = Clustering(count=clusters, dimensions=pca, seed=options.get("seed", 0))
    own = {name: options.pop(name) for name in _PROFILING if name in options}
    shared = {name: options[name] for name in ("precision", "seed") if name in options}
    taken = profile(model, tokenizer, {EXPANDED: text}, inputs=False, **own, **shared)
    return select(model, taken, sparsity=sparsity, clusters=clustering, **options)


_PROFILING = (
    "max_tokens",
    "max_length",
    "batch_size",
    "validation_tokens",
    "validation_share",
    "max_memory",
    "work_folder",
)

"""Whether entangled rows suffer most from sparsification, as the paper says: two experiments.

*Relation*: every row of the incoming leaves is pruned to a sparsity, by magnitude and by SparseGPT,
each row to the same. With H = E[x x^T] over held-out text the error of a row's output is
``(w' - w) H (w' - w)^T``; over the output's variance it stands beside the row's entanglement.
*Harm*: the same share of every leaf's rows is pruned, the most entangled, random ones, the least
entangled, and the model's perplexity compared.

Source: Sawmya et al. 2025, "Sparse Expansion", arXiv:2405.15756, sections on neuronal entanglement.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse_pathways.discovery.passes import evaluation_mode, run_decoder
from hf_sparse_pathways.discovery.profiles import DomainProfile, Profile
from hf_sparse_pathways.discovery.sparsegpt import BLOCK, InverseFactor, Pattern, prune_weights
from hf_sparse_pathways.discovery.text import TextSource
from hf_sparse_pathways.discovery.windows import Window, make_batches
from hf_sparse_pathways.errors import PathwaysError, named
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.measure.arms import ScoredText
from hf_sparse_pathways.measure.correlation import correlate
from hf_sparse_pathways.measure.entanglement import Harm, Relation
from hf_sparse_pathways.measure.experiments import draw_unseen, measure_pathways
from hf_sparse_pathways.pathways.pathway import Pathway

METHODS = ("magnitude", "sparsegpt")
SPARSITIES = (0.5, 0.8)
SHARE = 0.1
"""Of each leaf's rows that are pruned to see what it does to the model."""

HARD = 0.8
"""To which sparsity they are."""

MOST, RANDOM, LEAST = "most entangled", "random", "least entangled"
_MOST_POINTS = 2000


def relate_entanglement(  # noqa: PLR0913
    model: PreTrainedModel,
    tokenizer: Any,
    profile: Profile,
    texts: Mapping[str, TextSource],
    *,
    max_tokens: int,
    max_length: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> tuple[tuple[Relation, ...], tuple[Harm, ...]]:
    """Measure relation and harm on each domain's text. The model is left as it was.

    Args:
        model: The profiled dense model.
        tokenizer: Its tokenizer.
        profile: Its profile, with entanglement; its windows are what SparseGPT is calibrated on.
        texts: Domain -> text source; documents of the profile are left out.
        max_tokens: Most tokens per domain.
        max_length: Most tokens per window.
        batch_size: Windows per forward pass.
        seed: Decides windows, random rows, resampling, and which points are drawn.

    Raises:
        PathwaysError: The profile holds no entanglement.
        UnknownNameError: A domain that the profile does not have.
        TextError: A domain has no text that the profile has not seen.
    """
    relations: list[Relation] = []
    harms: list[Harm] = []
    scored = draw_unseen(
        model, tokenizer, profile, texts, max_tokens=max_tokens, max_length=max_length, seed=seed
    )
    for domain, text in scored.items():
        known = profile[domain]
        if not known.entanglement:
            raise PathwaysError(
                f"The profile holds no entanglement of {domain!r}. Take it with "
                f"{named('entanglement', True)}."
            )
        seen = input_moments(model, known.windows, batch_size)
        held_out = input_moments(model, text.windows, batch_size)
        relations.extend(_relations(model, known, seen, held_out, domain, seed))
        pathways = _sparsified(model, known, seen, seed)
        harms.extend(_harms(model, text, pathways, batch_size, seed))
    return tuple(relations), tuple(harms)


@torch.no_grad()
def input_moments(model: nn.Module, windows: Sequence[Window], batch_size: int) -> list[Tensor]:
    """Return E[z z^T] of each FFN block's input, z = [x, 1], float32 ``(d_in + 1, d_in + 1)``."""
    blocks = find_blocks(model)
    sums = [torch.zeros(block.d_in + 1, block.d_in + 1) for block in blocks]
    rows = torch.empty(0, dtype=torch.int64)
    handles = []
    for block, total in zip(blocks, sums, strict=True):

        def see(_: nn.Module, args: tuple[Any, ...], total: Tensor = total) -> None:
            x = args[0].flatten(0, -2)
            x = x.index_select(0, rows.to(x.device)).float()
            z = torch.cat([x, x.new_ones(len(x), 1)], 1)
            total.add_((z.T @ z).cpu())

        handles.append(block.incoming[0].register_forward_pre_hook(see))
    try:
        with all_dense(), evaluation_mode(model):
            for batch in make_batches(windows, batch_size):
                rows = batch.mask.flatten().nonzero().flatten()
                run_decoder(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [total / total[-1, -1] for total in sums]


def prune_rows(weight: Tensor, inputs: InverseFactor, method: str, sparsity: float) -> Tensor:
    """Return a weight of which every row has lost the same number of entries, float32. Pure.

    Args:
        weight: ``(rows, d_in)``.
        inputs: Of its input, for SparseGPT.
        method: A name in ``METHODS``.
        sparsity: Fraction of each row that goes.
    """
    weight = weight.float()
    columns = weight.shape[1]
    if method == "magnitude":
        gone = weight.abs().topk(round(sparsity * columns), dim=1, largest=False).indices
        return weight.scatter(1, gone, 0.0)
    group = max(size for size in range(1, BLOCK + 1) if columns % size == 0)
    return prune_weights(weight, inputs, Pattern(sparsity, group))


def row_errors(weight: Tensor, pruned: Tensor, moments: Tensor) -> Tensor:
    """Return E[(y' - y)^2] / Var(y) of every row, float64; NaN where the output never varies.

    Args:
        weight: ``(rows, d_in)``, of y.
        pruned: The same, of y'.
        moments: E[z z^T] of the input.
    """
    second, mean = moments[:-1, :-1].double(), moments[-1, :-1].double()
    weight, change = weight.double(), (pruned - weight).double()
    variance = ((weight @ second) * weight).sum(1) - (weight @ mean).square()
    error = ((change @ second) * change).sum(1)
    return torch.where(variance > 0, error / variance, torch.nan)


def _leaf_rows(block: FfnBlock, distances: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each incoming leaf's weight, and the entanglement of its rows."""
    sizes = [linear_weight(leaf).shape[0] for leaf in block.incoming]
    parts = torch.split(distances.flatten(), sizes)
    return [(linear_weight(leaf), own) for leaf, own in zip(block.incoming, parts, strict=True)]


@torch.no_grad()
def _relations(
    model: nn.Module,
    known: DomainProfile,
    seen: Sequence[Tensor],
    held_out: Sequence[Tensor],
    domain: str,
    seed: int,
) -> list[Relation]:
    """Return one relation per method and sparsity."""
    how = [(method, sparsity) for method in METHODS for sparsity in SPARSITIES]
    found: dict[tuple[str, float], list[Tensor]] = {own: [] for own in how}
    blocks = zip(find_blocks(model), known.entanglement, seen, held_out, strict=True)
    for block, distances, calibrated, measured in blocks:
        inputs = InverseFactor.of(calibrated[:-1, :-1])
        for weight, own in _leaf_rows(block, distances):
            weight = weight.float().cpu()
            for method, sparsity in how:
                pruned = prune_rows(weight, inputs, method, sparsity)
                errors = row_errors(weight, pruned, measured)
                pairs = torch.stack([own.double(), errors], 1)
                found[method, sparsity].append(pairs[errors.isfinite()])
    return [_relation(domain, *own, leaves, seed) for own, leaves in found.items()]


def _relation(
    domain: str, method: str, sparsity: float, leaves: Sequence[Tensor], seed: int
) -> Relation:
    """Return how the columns of ``(rows, 2)`` go together over all leaves, and within them."""
    pairs = torch.cat(list(leaves))
    pearson, spearman = correlate(*pairs.T.tolist())
    own = [correlate(*leaf.T.tolist())[1].value for leaf in leaves if len(leaf) > 1]
    known = [value for value in own if value is not None]
    chosen = random.Random(seed).sample(range(len(pairs)), min(_MOST_POINTS, len(pairs)))
    return Relation(
        domain=domain,
        method=method,
        sparsity=sparsity,
        pearson=pearson,
        spearman=spearman,
        within=sum(known) / max(len(known), 1),
        points=tuple((x, y) for x, y in pairs[chosen].tolist()),
    )


@torch.no_grad()
def _sparsified(
    model: nn.Module, known: DomainProfile, seen: Sequence[Tensor], seed: int
) -> dict[str, Pathway]:
    """Return pathways in which as many rows of every branch are pruned, by rule."""
    made: dict[str, list[BlockPathway]] = {rule: [] for rule in (MOST, RANDOM, LEAST)}
    generator = torch.Generator().manual_seed(seed)
    for block, distances, moments in zip(find_blocks(model), known.entanglement, seen, strict=True):
        inputs = InverseFactor.of(moments[:-1, :-1])
        count = max(1, round(SHARE * block.d_ff))
        orders = {
            MOST: distances.argsort(1, descending=True),
            RANDOM: torch.rand(distances.shape, generator=generator).argsort(1),
            LEAST: distances.argsort(1),
        }
        changes: dict[str, list[Tensor]] = {rule: [] for rule in orders}
        first = 0
        for leaf in block.incoming:
            weight = linear_weight(leaf)
            branches = len(weight) // block.d_ff
            change = prune_rows(weight.cpu(), inputs, "sparsegpt", HARD) - weight.float().cpu()
            change = change.to(weight.dtype).view(branches, block.d_ff, -1)
            for rule, order in orders.items():
                own = torch.zeros_like(change)
                for branch, rows in enumerate(order[first : first + branches, :count]):
                    own[branch, rows] = change[branch, rows]
                changes[rule].append(own.flatten(0, 1))
            first += branches
        keep = torch.ones(block.d_ff, dtype=torch.bool)
        for rule, incoming in changes.items():
            made[rule].append(BlockPathway(keep=keep, incoming=tuple(incoming)))
    return {rule: Pathway(blocks=tuple(blocks)) for rule, blocks in made.items()}


def _harms(
    model: PreTrainedModel,
    text: ScoredText,
    pathways: Mapping[str, Pathway],
    batch_size: int,
    seed: int,
) -> list[Harm]:
    """Measure pathways in which rows are pruned."""
    rows = measure_pathways(model, text, pathways, batch_size=batch_size, seed=seed)
    return [
        Harm(
            domain=row.domain,
            rule=str(row.pathway),
            share=SHARE,
            sparsity=HARD,
            ratio=row.ratio,
            interval=row.interval,
            tokens=row.tokens,
            documents=row.documents,
        )
        for row in rows
    ]

"""Measured partners of what a profile suggests, on held-out documents.

*Preservation*: how much of the dense model's output stays when 5, 10 or 15 % of every block's
neurons go, by the paper's rule (``mean_abs``), by ``wanda``, and by ``obs`` with its repair.
*Selection*: skip the least active neurons (negative) against keep the most specialised (positive),
and random ones, with as many neurons of every block each. *Shuffled*: the specialisation of domains
whose text was dealt at random, which is what chance alone makes.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse_pathways.discovery.documents import Document, Documents
from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import profile as take_profile
from hf_sparse_pathways.discovery.recipe import OBS
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.text import TextSource, read_documents
from hf_sparse_pathways.discovery.windows import resolve_length
from hf_sparse_pathways.errors import TextError
from hf_sparse_pathways.measure.arms import DENSE, ScoredText, measure_arms, pathway_arm
from hf_sparse_pathways.measure.paper import PRESERVED_SPARSITIES
from hf_sparse_pathways.measure.quality import random_partner
from hf_sparse_pathways.measure.quality_report import QualityRow
from hf_sparse_pathways.measure.specialisation import activation_ratios
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

RULES = ("mean_abs", "wanda", OBS)
"""Methods whose output preservation is measured, the paper's first."""

NEGATIVE, POSITIVE, RANDOM = "negative", "positive", "random"
SELECTION_SPARSITIES = (0.15, 0.3, 0.5)


@dataclass(frozen=True, kw_only=True)
class MeasuredRule:
    """One rule at one sparsity on one domain's held-out text, beside the dense model.

    Attributes:
        domain: Whose text, and whose neurons.
        rule: A name in ``RULES``, or ``negative``, ``positive`` or ``random``.
        sparsity: Fraction of every block's neurons removed, rounded up to whole neurons.
        cosine: Mean cosine of the hidden states before the head with the dense model's.
        agreement: Fraction of tokens after which both prefer the same successor.
        divergence: Mean KL divergence from the dense model's predictions, nats per token.
        ratio: Perplexity over the dense model's.
        interval: 95 % interval of the ratio over resampled documents; None with one document.
        tokens: Scored tokens.
        documents: Documents they come from.
    """

    domain: str
    rule: str
    sparsity: float
    cosine: float
    agreement: float
    divergence: float
    ratio: float
    interval: tuple[float, float] | None
    tokens: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class Experiments:
    """What was measured.

    Attributes:
        dtype: Of the model's weights: in bfloat16 equal sums in another order already differ.
        preservation: One per domain, method and sparsity.
        selection: One per domain, rule and sparsity; none without a second domain.
    """

    dtype: str
    preservation: tuple[MeasuredRule, ...]
    selection: tuple[MeasuredRule, ...]


def run_experiments(  # noqa: PLR0913
    model: PreTrainedModel,
    tokenizer: Any,
    profile: Profile,
    texts: Mapping[str, TextSource],
    *,
    max_tokens: int,
    max_length: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    precision: str = "model",
) -> Experiments:
    """Measure preservation and selection on each domain's text. The model is left as it was.

    Args:
        model: The profiled dense model.
        tokenizer: Its tokenizer.
        profile: Its profile; ``obs`` is left out if it holds no Gram matrices.
        texts: Domain -> text source; documents of the profile are left out.
        max_tokens: Most tokens per domain.
        max_length: Most tokens per window.
        batch_size: Windows per forward pass.
        seed: Decides windows, random masks and resampling.
        precision: Of what ``obs`` runs over the profile's text, as in ``select``; what is measured
            runs in the model's dtype.

    Raises:
        UnknownNameError: A domain that the profile does not have.
        TextError: A domain has no text that the profile has not seen.
    """
    scored = draw_unseen(
        model, tokenizer, profile, texts, max_tokens=max_tokens, max_length=max_length, seed=seed
    )
    preservation: list[MeasuredRule] = []
    selection: list[MeasuredRule] = []
    for domain, text in scored.items():
        measure = partial(_measure, model, text, batch_size=batch_size, seed=seed)
        own = profile.subset([domain])
        for sparsity in PRESERVED_SPARSITIES:
            rules = {
                rule: _select(model, own, rule, sparsity, precision)
                for rule in RULES
                if rule != OBS or own[domain].grams
            }
            preservation.extend(measure(sparsity, rules))
        for sparsity in SELECTION_SPARSITIES if len(profile.domains) > 1 else ():
            selection.extend(measure(sparsity, _opposites(model, profile, domain, sparsity, seed)))
    return Experiments(
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        preservation=tuple(preservation),
        selection=tuple(selection),
    )


def draw_unseen(  # noqa: PLR0913
    model: nn.Module,
    tokenizer: Any,
    profile: Profile,
    texts: Mapping[str, TextSource],
    *,
    max_tokens: int,
    max_length: int | None,
    seed: int,
) -> dict[str, ScoredText]:
    """Draw windows of each domain's documents that a profile was not taken on.

    Raises:
        UnknownNameError: A domain that the profile does not have.
        TextError: A domain has no text that the profile has not seen.
    """
    length = resolve_length(model, max_length)
    scored = {}
    for domain, source in texts.items():
        fresh, excluded = unseen(
            profile, domain, read_documents(source, seed=seed, tokens=max_tokens)
        )
        scored[domain] = ScoredText.draw(
            domain,
            fresh,
            tokenizer,
            max_tokens=max_tokens,
            max_length=length,
            seed=seed,
            excluded=excluded,
        )
    return scored


def unseen(profile: Profile, domain: str, documents: Documents) -> tuple[Documents, int]:
    """Leave out documents that a profile was taken on, of any domain; return how many those were.

    Raises:
        UnknownNameError: A domain that the profile does not have.
        TextError: None is left.
    """
    profile[domain]
    fresh, excluded = documents.unseen(known.provenance for known in profile.by_domain.values())
    if not fresh.items:
        raise TextError(
            f"Domain {domain!r}: no text of {documents.source} is left to measure on; the profile "
            f"was taken on {excluded} of its {len(documents.items)} documents. Give held-out text."
        )
    return fresh, excluded


def _select(
    model: PreTrainedModel, own: Profile, rule: str, sparsity: float, precision: str = "model"
) -> Pathway:
    """Return a domain's pathway with equally wide blocks, all chosen from the dense model."""
    pathways = select(
        model,
        own,
        sparsity=sparsity,
        method=rule,
        allocation="uniform",
        order="one-shot",
        precision=precision,
        controls=False,
    )
    return pathways[own.domains[0]]


def _opposites(
    model: PreTrainedModel, profile: Profile, domain: str, sparsity: float, seed: int
) -> dict[str, Pathway]:
    """Return pathways that skip the least active, keep the most specialised, and chance."""
    negative = _select(model, profile.subset([domain]), "mean_abs", sparsity)
    index = profile.domains.index(domain)
    ratios = [block[index] for block in activation_ratios(profile)]
    kept = [block.kept for block in negative.blocks]
    positive = Pathway.from_keep(map(keep_largest, ratios, kept))
    random = random_partner(negative, profile.base.blocks, seed)
    return {NEGATIVE: negative, POSITIVE: positive, RANDOM: random}


def keep_largest(values: Tensor, count: int) -> Tensor:
    """Return the keep mask of the ``count`` largest values, the first ones of equal values."""
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[values.argsort(descending=True, stable=True)[:count]] = True
    return keep


def _measure(
    model: PreTrainedModel,
    text: ScoredText,
    sparsity: float,
    pathways: Mapping[str, Pathway],
    *,
    batch_size: int,
    seed: int,
) -> list[MeasuredRule]:
    """Measure pathways of one sparsity on one domain's text."""
    rows = measure_pathways(model, text, pathways, batch_size=batch_size, seed=seed)
    return [_measured(row, sparsity) for row in rows]


def measure_pathways(
    model: PreTrainedModel,
    text: ScoredText,
    pathways: Mapping[str, Pathway],
    *,
    batch_size: int,
    seed: int,
) -> list[QualityRow]:
    """Return one row per pathway of a dense model, beside dense, on one domain's text."""
    made = Pathways(base=BaseModel.of(model), by_domain=pathways)
    sparse = SparsePathwaysForCausalLM.from_dense(model, made)
    arms = [DENSE, *(pathway_arm("pathway", rule, made) for rule in pathways)]
    with evaluation_mode(sparse):
        return measure_arms(sparse, text, arms, batch_size=batch_size, seed=seed)[1:]


def _measured(row: QualityRow, sparsity: float) -> MeasuredRule:
    return MeasuredRule(
        domain=row.domain,
        rule=str(row.pathway),
        sparsity=sparsity,
        cosine=row.cosine,
        agreement=row.agreement,
        divergence=row.divergence,
        ratio=row.ratio,
        interval=row.interval,
        tokens=row.tokens,
        documents=row.documents,
    )


def shuffled_profile(  # noqa: PLR0913
    model: PreTrainedModel,
    tokenizer: Any,
    profile: Profile,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    precision: str = "model",
) -> Profile | None:
    """Profile as many domains whose windows are dealt at random; None without the text's tokens.

    Each has as many windows of every domain as the others, so that whatever specialisation is seen
    in this profile is chance.
    """
    dealt: dict[str, list[Document]] = {
        f"shuffled {n + 1}": [] for n in range(len(profile.domains))
    }
    hands = list(dealt.values())
    for domain, known in profile.by_domain.items():
        windows = list(known.windows)
        random.Random(seed).shuffle(windows)
        for index, window in enumerate(windows):
            text = tokenizer.decode(list(window.ids), skip_special_tokens=True)
            hands[index % len(hands)].append(Document(text, f"{domain}[{index}]"))
    if len(hands) < 2 or not all(hands):
        return None
    return take_profile(
        model,
        tokenizer,
        {name: Documents(items=tuple(items), source=name) for name, items in dealt.items()},
        max_tokens=max(known.tokens for known in profile.by_domain.values()),
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        grams=False,
        validation_tokens=0,
        router_tokens=0,
        precision=precision,
    )

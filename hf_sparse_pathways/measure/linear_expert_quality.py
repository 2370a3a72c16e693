"""What restricting sgatlin layers to a domain's experts costs: perplexity, and what it saves.

Every figure is of held-out documents, that is of those that the usage was not measured on, and
stands beside the model with all experts, the experts that all domains together use most (pooled), a
random choice of as many, and the other domains' experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.trials import batch_loss, run_model
from hf_sparse_pathways.discovery.windows import Batch, draw_windows, make_batches, resolve_length
from hf_sparse_pathways.errors import TextError, UnknownNameError
from hf_sparse_pathways.measure.figures import format_figure, markdown_table
from hf_sparse_pathways.measure.linear_experts import ExpertUsage, restrict_experts, sgatlin_layers
from hf_sparse_pathways.sgatlin.restriction import ExpertSets

if TYPE_CHECKING:
    from hf_sparse_pathways.discovery.text import TextSource


@dataclass(frozen=True, kw_only=True)
class ExpertQuality:
    """Perplexities on one domain's held-out text.

    Attributes:
        domain: The domain.
        tokens: How many were scored.
        perplexity: With all experts.
        ratios: ``own``, ``pooled``, ``random`` and the other domains' names -> perplexity over that
            with all experts.
    """

    domain: str
    tokens: int
    perplexity: float
    ratios: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """What one share of the experts comes to.

    Attributes:
        share: Of each channel's experts, as asked for.
        rows: One per domain.
        bytes: Of the experts' rows: of all, and of one domain's.
    """

    share: float
    rows: Sequence[ExpertQuality]
    bytes: tuple[int, int]

    def to_markdown(self) -> str:
        """Return the report as a table and a sentence."""
        header = ["text", "tokens", "all experts", "own", "pooled", "random", "other domains'"]
        rows = []
        for row in self.rows:
            named = [format_figure(row.ratios[name]) for name in ("own", "pooled", "random")]
            others = [format_figure(row.ratios[r.domain]) for r in self.rows if r is not row]
            figures = [str(row.tokens), format_figure(row.perplexity), *named]
            rows.append([row.domain, *figures, ", ".join(others) or "-"])
        every, kept = self.bytes
        note = (
            f"{self.share:.0%} of each channel's experts: {kept / 1e6:.1f} of {every / 1e6:.1f} MB "
            "of rows. Perplexity on held-out text, and ratios to it."
        )
        return f"{note}\n\n{markdown_table(header, rows)}"


def evaluate_experts(  # noqa: PLR0913
    model: Any,
    tokenizer: Any,
    texts: "Mapping[str, TextSource]",
    usage: ExpertUsage,
    share: float,
    *,
    max_tokens: int = 16_384,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> ExpertReport:
    """Measure a model restricted to each domain's experts on that domain's held-out text.

    Args:
        model: The model that ``usage`` was measured on.
        tokenizer: Its tokenizer.
        texts: Domain -> text; documents that ``usage`` has seen are left out.
        usage: What the domains use.
        share: Of each channel's experts that may be chosen.
        max_tokens: Most tokens of a domain.
        max_length: Most tokens of a window.
        batch_size: Windows of a pass.
        seed: Decides what is drawn, and the random experts.

    Raises:
        UnknownNameError: A domain that ``usage`` does not have.
        TextError: Nothing is left of a domain's text.
    """
    for domain in texts:
        if domain not in usage.by_domain:
            raise UnknownNameError("domain", domain, usage.by_domain)
    own = {domain: usage.experts(domain, share) for domain in texts}
    controls = {"pooled": usage.pooled(share), "random": usage.random(share, seed)}
    length = resolve_length(model, max_length)
    rows = []
    for domain, source in texts.items():
        documents = read_documents(source, seed=seed, tokens=max_tokens)
        fresh = documents.without(*usage.seen[domain])
        windows = draw_windows(
            fresh, tokenizer, max_tokens=max_tokens, max_length=length, seed=seed
        )
        batches = list(make_batches([w for w in windows if len(w.ids) > 1], batch_size))
        if not batches:
            raise TextError(
                f"Of the text of {domain!r} ({documents.source}) nothing is left but what the "
                "usage was measured on. Give more, or measure the usage on fewer tokens."
            )
        others = {name: sets for name, sets in own.items() if name != domain}
        rows.append(_score(model, domain, batches, {"own": own[domain], **controls, **others}))
    return ExpertReport(share=share, rows=rows, bytes=_bytes(model, controls["random"]))


def _score(
    model: Any, domain: str, batches: Sequence[Batch], sets: Mapping[str, ExpertSets]
) -> ExpertQuality:
    """Return a model's perplexity on a text, and what each set of experts makes of it."""
    loss, tokens = mean_loss(model, batches)
    ratios = {}
    for name, experts in sets.items():
        with restrict_experts(model, experts):
            ratios[name] = math.exp(mean_loss(model, batches)[0] - loss)
    return ExpertQuality(domain=domain, tokens=tokens, perplexity=math.exp(loss), ratios=ratios)


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch]) -> tuple[float, int]:
    """Return the mean loss of all tokens that have one before them, in nats, and their number."""
    total, tokens = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            loss, count = batch_loss(run_model(model, batch), batch)
            total, tokens = total + loss, tokens + count
    return total / tokens, tokens


def _bytes(model: Any, sets: ExpertSets) -> tuple[int, int]:
    """Return the bytes of all rows of ``u`` and ``v``, and of as many experts as some sets have."""
    layers = sgatlin_layers(model)
    every = sum(2 * layer.u.numel() * layer.u.element_size() for layer in layers)
    rows = [(int(own.sum()), layer) for own, layer in zip(sets, layers, strict=True)]
    return every, sum(2 * count * layer.d_model * layer.u.element_size() for count, layer in rows)

"""Where prompts went, as values that render as tables and JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_sparse_pathways.measure.figures import Section, format_figure
from hf_sparse_pathways.tables import ShownAsTables

DENSE = "dense"
"""What tables call the decision for no domain."""

_NORMAL = 1.959964
"""Of the normal distribution, 95 % lie within so many standard deviations."""


@dataclass(frozen=True, kw_only=True)
class RoutedText:
    """Where the prompts of one text went.

    Attributes:
        text: Its name: a domain's, or another for text of no domain.
        known: Whether the pathways have a domain of that name.
        length: Tokens of a prompt.
        prompts: How many there were.
        decided: Domain, or ``dense`` -> how many prompts went there.
        kinds: The kinds of evidence that had to agree.
    """

    text: str
    known: bool
    length: int
    prompts: int
    decided: Mapping[str, int]
    kinds: tuple[str, ...]

    @property
    def right(self) -> int:
        """How many went where they belong: to their domain, or nowhere."""
        return self.decided.get(self.text if self.known else DENSE, 0)

    @property
    def wrong(self) -> int:
        """How many went to a domain that is not theirs."""
        dense = self.decided.get(DENSE, 0)
        return self.prompts - dense - (self.right if self.known else 0)


@dataclass(frozen=True, kw_only=True)
class RoutedQuality:
    """Perplexity of what follows one text's prompts.

    Attributes:
        text: Its name.
        length: Tokens of a prompt.
        tokens: Scored tokens.
        dense: Perplexity of the dense model.
        ratios: Way of choosing -> perplexity over the dense model's: ``auto``, ``oracle`` (the
            text's own domain, dense where there is none), and ``pooled`` where there is one.
    """

    text: str
    length: int
    tokens: int
    dense: float
    ratios: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RoutingCost:
    """What deciding takes beside the dense model's pass over the same prompt.

    Attributes:
        length: Tokens of the prompt, of one row.
        seconds: Median, of deciding.
        prefill: Median, of the pass.
    """

    length: int
    seconds: float
    prefill: float


@dataclass(frozen=True, kw_only=True)
class GuardedText:
    """What a guard does to documents of which the first half is of one domain.

    Attributes:
        before: The domain.
        after: Text of the second half; the same where the domain goes on.
        documents: How many there were.
        tokens: Scored tokens, those of the second halves.
        dense: Their perplexity, all computed by the dense model.
        ratios: Way of choosing -> perplexity over the dense model's: ``unguarded``, ``guard``,
            ``guard of auto`` (which may go to other domains) and ``oracle``, which changes where
            the text does.
        densely: Fraction of the scored tokens that ``guard`` computes densely.
        delay: Median number of them before the first such one.
    """

    before: str
    after: str
    documents: int
    tokens: int
    dense: float
    ratios: Mapping[str, float]
    densely: float
    delay: float


@dataclass(frozen=True, kw_only=True)
class GuardCost:
    """What a guard takes beside decoding, seconds per token of one row.

    Attributes:
        watching: Median, of looking at a token.
        decoding: Median, of computing it by a pathway.
    """

    watching: float
    decoding: float


@dataclass(frozen=True, kw_only=True, repr=False)
class RoutingReport(ShownAsTables):
    """What ``measure_routing`` returns.

    Attributes:
        domains: Between which the router chooses.
        rows: One per text and length.
        alone: The same by each kind of evidence without the others.
        quality: One per text, if it was measured.
        cost: One per length.
        guarded: One per domain and text, if a guard was measured.
        guard_cost: What it takes.
        size: Bytes of the domains' signatures.
        excluded: Documents left out because they were calibrated or validated on.
    """

    domains: tuple[str, ...]
    rows: tuple[RoutedText, ...]
    alone: tuple[RoutedText, ...] = ()
    quality: tuple[RoutedQuality, ...] = ()
    cost: tuple[RoutingCost, ...] = ()
    guarded: tuple[GuardedText, ...] = ()
    guard_cost: GuardCost | None = None
    size: int = 0
    excluded: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @property
    def lengths(self) -> list[int]:
        """Numbers of tokens of a prompt."""
        return sorted({row.length for row in self.rows})

    def sections(self) -> list[Section]:
        """Return the rates, a confusion matrix per length, quality and cost."""
        made = [self._rates(), *(self._confusion(length) for length in self.lengths)]
        if self.quality:
            made.append(self._quality())
        if self.guarded:
            made.append(self._guard())
        return [*made, self._cost()] if self.cost else made

    def to_markdown(self) -> str:
        """Render the tables as Markdown."""
        return "\n\n".join(section.to_markdown() for section in self.sections())

    def _rates(self) -> Section:
        rows = []
        for length in self.lengths:
            together = [row for row in self.rows if row.length == length]
            rows.append([str(length), "all", *_count_decisions(together)])
            for kind in dict.fromkeys(row.kinds for row in self.alone):
                by_it = [row for row in self.alone if row.length == length and row.kinds == kind]
                rows.append([str(length), *kind, *_count_decisions(by_it)])
        rates = ["right", "dense instead", "wrong domain", "unknown text sent anywhere"]
        note = (
            f"Domains: {', '.join(self.domains)}; {self.size} bytes of signatures. "
            "Share, count, 95 % Wilson interval. The router asks all kinds of evidence."
        )
        header = ["tokens", "evidence", *rates]
        return Section(title="Routing by length of the prompt", note=note, header=header, rows=rows)

    def _confusion(self, length: int) -> Section:
        columns = [*self.domains, DENSE]
        rows = [
            [
                row.text if row.known else f"{row.text} (unknown)",
                *(str(row.decided.get(column, 0)) for column in columns),
            ]
            for row in self.rows
            if row.length == length
        ]
        title = f"Prompts of {length} tokens: text (rows) by where it went (columns)"
        return Section(title=title, note="", header=["text", *columns], rows=rows)

    def _quality(self) -> Section:
        ways = list(dict.fromkeys(way for row in self.quality for way in row.ratios))
        rows = [
            [
                row.text,
                str(row.tokens),
                format_figure(row.dense),
                *(f"{row.ratios[way]:.3f}" if way in row.ratios else "-" for way in ways),
            ]
            for row in self.quality
        ]
        title = f"Perplexity behind prompts of {self.quality[0].length} tokens, ratio to dense"
        return Section(title=title, note="", header=["text", "tokens", DENSE, *ways], rows=rows)

    def _guard(self) -> Section:
        ways = list(self.guarded[0].ratios)
        rows = [
            [
                f"{row.before}, then {row.after}",
                str(row.tokens),
                format_figure(row.dense),
                *(f"{row.ratios[way]:.3f}" for way in ways),
                f"{100 * row.densely:.1f} %",
                f"{row.delay:.0f}",
            ]
            for row in self.guarded
        ]
        title = "Perplexity of the second half of documents that change, ratio to dense"
        header = ["document", "tokens", DENSE, *ways, "by guard densely", "after tokens"]
        cost = self.guard_cost
        note = (
            ""
            if cost is None
            else (
                f"Watching a token takes {1e3 * cost.watching:.3f} ms beside "
                f"{1e3 * cost.decoding:.1f} ms of decoding it "
                f"({100 * cost.watching / cost.decoding:.2f} %)."
            )
        )
        return Section(title=title, note=note, header=header, rows=rows)

    def _cost(self) -> Section:
        rows = [
            [
                str(cost.length),
                f"{1e3 * cost.seconds:.3f} ms",
                f"{1e3 * cost.prefill:.1f} ms",
                f"{100 * cost.seconds / cost.prefill:.2f} %",
            ]
            for cost in self.cost
        ]
        header = ["tokens", "deciding", "dense prefill", "share"]
        return Section(title="Cost of deciding, one prompt", note="", header=header, rows=rows)


def _count_decisions(rows: Sequence[RoutedText]) -> list[str]:
    """Render how many prompts of known text went right, nowhere, wrong, and of unknown anywhere."""
    known = [row for row in rows if row.known]
    unknown = [row for row in rows if not row.known]
    total, foreign = (sum(row.prompts for row in part) for part in (known, unknown))
    counts = [
        (sum(row.right for row in known), total),
        (sum(row.decided.get(DENSE, 0) for row in known), total),
        (sum(row.wrong for row in known), total),
        (sum(row.wrong for row in unknown), foreign),
    ]
    return [format_rate(*count) for count in counts]


def format_rate(count: int, total: int) -> str:
    """Render a share with its count and interval; "-" of nothing."""
    if not total:
        return "-"
    low, high = wilson_interval(count, total)
    return f"{100 * count / total:.1f} % ({count}/{total}; {100 * low:.1f}-{100 * high:.1f})"


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Source: E. Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, weight = count / total, _NORMAL**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)

"""What is known of entanglement, as tables."""

from collections.abc import Iterator

from hf_sparse_pathways.measure.correlation import Correlation
from hf_sparse_pathways.measure.entanglement import Entanglement, Harm, Relation, Spread
from hf_sparse_pathways.measure.figures import Section
from hf_sparse_pathways.shares import format_share


def entanglement_sections(found: Entanglement) -> Iterator[Section]:
    """Yield the tables: what was measured first."""
    yield from measured_sections(found)
    yield Section(
        title="Entanglement of incoming rows",
        note=(
            "W1 of a row's standardised output to the normal distribution, in standard deviations; "
            "0 is normal."
        ),
        header=["domain", "block", "leaf", "median", "90 % below", "largest"],
        rows=[_spread(row) for row in found.spreads],
    )


def measured_sections(found: Entanglement) -> Iterator[Section]:
    """Yield the tables of what sparsified rows cost, if that was measured."""
    if found.relations:
        yield Section(
            title="Entanglement and the error of sparsified rows, on held-out text",
            note=(
                "Every row of the incoming leaves is pruned to the sparsity. Error: mean squared "
                "change of its output over the output's variance. within: mean of Spearman's "
                "coefficient over the leaves by themselves, which does not count what differs "
                "between leaves."
            ),
            header=["domain", "removed", "by", "Pearson (95 %)", "Spearman (95 %)", "within", "n"],
            rows=[_relation(row) for row in found.relations],
        )
    if found.harms:
        first = found.harms[0]
        yield Section(
            title="Perplexity with some rows sparsified, on held-out text",
            note=(
                f"{format_share(first.share)} of every incoming leaf's rows lose "
                f"{format_share(first.sparsity)} of their weights, by SparseGPT."
            ),
            header=["domain", "rows", "perplexity ratio (95 %)", "tokens"],
            rows=[_harm(row) for row in found.harms],
        )


def _relation(row: Relation) -> list[str]:
    coefficients = map(_coefficient, (row.pearson, row.spearman))
    removed = format_share(row.sparsity)
    return [row.domain, removed, row.method, *coefficients, f"{row.within:.2f}", str(row.pearson.n)]


def _coefficient(found: Correlation) -> str:
    if found.value is None or found.interval is None:
        return "-" if found.value is None else f"{found.value:.2f}"
    low, high = found.interval
    return f"{found.value:.2f} ({low:.2f} to {high:.2f})"


def _harm(row: Harm) -> list[str]:
    interval = f" ({row.interval[0]:.4g}-{row.interval[1]:.4g})" if row.interval else ""
    tokens = f"{row.tokens} of {row.documents} documents"
    return [row.domain, row.rule, f"{row.ratio:.4g}{interval}", tokens]


def _spread(row: Spread) -> list[str]:
    values = (f"{value:.3f}" for value in (row.median, row.high, row.largest))
    return [row.domain, str(row.block), row.branch, *values]

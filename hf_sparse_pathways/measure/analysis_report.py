"""An analysis as tables in words: what the paper states first, and beside it what is seen."""

from collections.abc import Iterator, Sequence

from hf_sparse_pathways.measure.analysis import Analysis
from hf_sparse_pathways.measure.entanglement_report import entanglement_sections
from hf_sparse_pathways.measure.experiments import MeasuredRule
from hf_sparse_pathways.measure.figures import Section, format_figure
from hf_sparse_pathways.measure.gating_report import gating_sections
from hf_sparse_pathways.measure.routed_experts import expert_sections
from hf_sparse_pathways.measure.specialisation import PAPER, Criterion, Specialisation
from hf_sparse_pathways.measure.statements import compare_statements
from hf_sparse_pathways.shares import format_share


def to_markdown(analysis: Analysis, plots: Sequence[str] = ()) -> str:
    """Render a whole report; plots are names of picture files beside it."""
    parts = [f"# Neurons and domains of {analysis.base or 'a model without a name'}"]
    parts.append(describe(analysis))
    parts.extend(section.to_markdown() for section in sections(analysis))
    parts.extend(f"![{name.removesuffix('.png')}]({name})" for name in plots)
    return "\n\n".join(parts) + "\n"


def describe(analysis: Analysis) -> str:
    """Say in a few sentences what was analysed."""
    tokens = ", ".join(f"{name} {count}" for name, count in analysis.tokens.items())
    size = analysis.size
    total = size.ffn + size.experts + size.other + size.head
    experts = f"experts {size.experts / total:.1%}, " if size.experts else ""
    lines = [
        f"{analysis.summary}; {format_figure(size.parameters / 1e6)} M parameters. "
        f"The FFN blocks do {size.ffn_share:.1%} of the multiply-adds per token (attention over "
        f"the context, which grows with it, not counted), {experts}the head "
        f"{size.head / total:.1%}.",
        f"Tokens profiled: {tokens}.",
    ]
    left_out = len(analysis.routed) - len(analysis.experts)
    if left_out:
        lines.append(f"Routed experts in {left_out} layers are left out.")
    if len(analysis.tokens) == 1:
        lines.append("With one domain nothing can be said of specialisation or overlap.")
    if analysis.experiments is None and analysis.blocks:
        lines.append("No experiments were run: preservation and selection were not measured.")
    elif analysis.experiments is not None:
        lines.append(f"Experiments ran in {analysis.experiments.dtype}.")
    return " ".join(lines)


def sections(analysis: Analysis) -> Iterator[Section]:
    """Yield the report's tables."""
    if analysis.blocks:
        yield from _block_sections(analysis)
    yield from expert_sections(analysis.experts)
    yield from gating_sections(analysis.gating)


def _block_sections(analysis: Analysis) -> Iterator[Section]:
    """Yield the tables of the FFN blocks."""
    yield compare_statements(analysis)
    if analysis.specialisation is not None:
        yield _criteria(analysis, analysis.specialisation)
    yield _skippable(analysis)
    yield _speedups(analysis)
    yield _roles(analysis)
    if analysis.specialisation is not None:
        yield _overlaps(analysis)
    if analysis.experiments is not None:
        yield _preservation(analysis.experiments.preservation)
        if analysis.experiments.selection:
            yield _selection(analysis.experiments.selection)
    if analysis.entanglement is not None:
        yield from entanglement_sections(analysis.entanglement)
    yield _per_block(analysis)


def _criteria(analysis: Analysis, specialisation: Specialisation) -> Section:
    rows = []
    for fraction in specialisation.fractions:
        cells = [
            str(fraction.criterion),
            f"{fraction.criterion.as_ratio(specialisation.domains):.3g}",
            f"{fraction.overall:.2%}" if fraction.reachable else "out of reach",
        ]
        if analysis.shuffled is not None:
            cells.append(f"{analysis.shuffled.of(fraction.criterion).overall:.2%}")
        rows.append([*cells, *(f"{value:.2%}" for value in fraction.per_domain.values())])
    chance = ["shuffled text"] if analysis.shuffled is not None else []
    domains = specialisation.domains
    chance_excess = ""
    if analysis.shuffled is not None:
        chance_excess = f" (shuffled text {analysis.shuffled.mean_excess:.3f})"
    return Section(
        title="Specialised neurons",
        note=(
            f"Fraction of {specialisation.neurons} neurons whose mean |activation| in a domain "
            f"exceeds a threshold, {specialisation.silent} of them silent on all text. ratio: to "
            f"the mean over the {domains} domains, which cannot exceed {domains}; excess: (ratio - "
            f"1) / {domains - 1}; share: of the neuron's activation. Mean excess of a neuron in "
            f"its strongest domain: {specialisation.mean_excess:.3f}{chance_excess}. Shuffled "
            "text has no domains: what is seen there is chance."
        ),
        header=["criterion", "as ratio", "any domain", *chance, *analysis.domains],
        rows=rows,
    )


def _skippable(analysis: Analysis) -> Section:
    rows = []
    for fractions in analysis.skippable:
        for domain, overall in fractions.per_domain.items():
            blocks = fractions.per_block[domain]
            cells = (overall, blocks[0], min(blocks), max(blocks), fractions.flops[domain])
            rows.append([f"{fractions.pool}: {domain}", *(f"{value:.1%}" for value in cells)])
    return Section(
        title=f"Skippable neurons, below the {analysis.percentile:g}th percentile of the domain",
        note=(
            "The overall fraction is the percentile by construction; over one layer so is every "
            "block's. Only pool model can tell blocks apart, and it compares activations of blocks "
            "whose scales differ."
        ),
        header=["pool: domain", "all blocks", "first block", "least", "most", "FFN FLOPs"],
        rows=rows,
    )


def _speedups(analysis: Analysis) -> Section:
    rows = [
        [
            f"{speedup.pool}: {speedup.domain}",
            f"{speedup.paper:.2f}x",
            f"{speedup.amdahl:.2f}x",
            f"{analysis.size.speedup(1.0):.2f}x",
        ]
        for speedup in analysis.speedups
    ]
    return Section(
        title="Potential speed-up, in FLOPs",
        note="Not measured, and no wall clock; see `sparse-pathways benchmark` for that.",
        header=["pool: domain", "paper's formula", "whole model (Amdahl)", "ceiling without FFN"],
        rows=rows,
    )


def _roles(analysis: Analysis) -> Section:
    rows = [
        [
            role.name,
            f"{role.first} to {role.last}",
            _percent(role.specialised),
            _percent(role.specialised_normalised),
            "-" if role.overlap is None else f"{role.overlap:.2f}",
            *(f"{value:.1%}" for value in role.skippable.values()),
        ]
        for role in analysis.roles
    ]
    skipped = [f"skipped in {name}" for name in analysis.domains]
    return Section(
        title="Layer roles, by depth",
        note="overlap: mean Jaccard index of the domains' skipped halves; skipped: pool model.",
        header=["blocks", "indices", str(PAPER), "excess > 0.25", "overlap", *skipped],
        rows=rows,
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _overlaps(analysis: Analysis) -> Section:
    pairs = [f"{pair.first} / {pair.second}" for pair in analysis.overlaps[0].pairs]
    rows = [
        [
            format_share(overlap.sparsity),
            *(f"{pair.jaccard:.2f}" for pair in overlap.pairs),
            f"{overlap.pairs[0].chance:.2f}",
        ]
        for overlap in analysis.overlaps
    ]
    return Section(
        title="Overlap of skipped neurons between domains (Jaccard)",
        note="As many neurons of every block are skipped; 1 means the domains skip the same.",
        header=["skipped", *pairs, "chance"],
        rows=rows,
    )


def _preservation(rows: Sequence[MeasuredRule]) -> Section:
    return Section(
        title="Output preservation on held-out text",
        note=(
            "Beside the dense model, as many neurons of every block removed. obs repairs what is "
            "kept, the others do not. Cosine of the hidden states before the head is a weak "
            "proxy: see top-1 agreement and KL beside it."
        ),
        header=_MEASURED,
        rows=[_measured(row) for row in rows],
    )


def _selection(rows: Sequence[MeasuredRule]) -> Section:
    return Section(
        title="Negative against positive selection on held-out text",
        note=(
            "negative: skip the least active neurons (the paper's rule); positive: keep the most "
            "specialised by ratio; random: any. Each keeps as many neurons of every block."
        ),
        header=_MEASURED,
        rows=[_measured(row) for row in rows],
    )


_MEASURED = (
    "domain",
    "removed",
    "rule",
    "cosine",
    "top-1",
    "KL (nats)",
    "perplexity ratio (95 %)",
    "tokens",
)


def _measured(row: MeasuredRule) -> list[str]:
    interval = f" ({row.interval[0]:.3g}-{row.interval[1]:.3g})" if row.interval else ""
    return [
        row.domain,
        format_share(row.sparsity),
        row.rule,
        f"{row.cosine:.4f}",
        f"{row.agreement:.1%}",
        f"{row.divergence:.4f}",
        f"{row.ratio:.3g}{interval}",
        f"{row.tokens} of {row.documents} documents",
    ]


def _per_block(analysis: Analysis) -> Section:
    pool = analysis.skippable_by("model").per_block
    header = ["block"]
    columns: list[Sequence[float]] = []
    if analysis.specialisation is not None:
        for criterion in (PAPER, Criterion(kind="ratio", threshold=1.5)):
            header.append(str(criterion))
            columns.append(analysis.specialisation.of(criterion).per_block)
        fraction = analysis.specialisation.of(PAPER)
        header.extend(f"{PAPER} in {name}" for name in analysis.domains)
        columns.extend(fraction.per_domain_and_block.values())
    header.extend(f"skipped in {name}" for name in analysis.domains)
    columns.extend(pool.values())
    rows = [
        [str(index), *(f"{column[index]:.1%}" for column in columns)]
        for index in range(len(analysis.blocks))
    ]
    note = "Fraction of each FFN block's neurons; skipped: pool model."
    return Section(title="Every FFN block", note=note, header=header, rows=rows)

"""What the paper states (``paper.py``), and beside it what an analysis has seen."""

from hf_sparse_pathways.measure import paper
from hf_sparse_pathways.measure.analysis import Analysis
from hf_sparse_pathways.measure.experiments import NEGATIVE, POSITIVE
from hf_sparse_pathways.measure.figures import Section
from hf_sparse_pathways.measure.specialisation import PAPER


def compare_statements(analysis: Analysis) -> Section:
    """Return the table of the paper's statements, with what is seen beside each."""
    published = [model.specialised for model in paper.MODELS]
    first = paper.FIRST_BLOCK_SKIPPABLE
    pool = analysis.skippable_by("model")
    blocks = {name: fractions[0] for name, fractions in pool.per_block.items()}
    rows = [
        [
            f"neurons specialised ({PAPER})",
            f"{min(published):.1%} to {max(published):.1%} ({len(published)} models)",
            _seen_specialised(analysis),
        ],
        [
            f"skippable in the first block (below p{analysis.percentile:g})",
            f"{_list(first)} (Phi-3.5-mini; pool not stated)",
            f"pool model: {_list(blocks)}; pool layer: "
            f"{_list({n: f[0] for n, f in analysis.skippable_by('layer').per_block.items()})}",
        ],
        [
            "potential speed-up",
            "1 / (1 - skippable fraction)",
            _seen_speedup(analysis),
        ],
        [
            "cosine of final hidden states at 5 to 15 %",
            f"at least {paper.PRESERVED_COSINE}",
            _seen_cosine(analysis),
        ],
        [
            "skip the least active, not keep the most specialised",
            "the paper's choice (negative selection)",
            _seen_selection(analysis),
        ],
    ]
    average = sum(first.values()) / len(first)
    note = (
        f"The paper does not say what its percentile is pooled over. Its figures for the first "
        f"block average {average:.1%}; over one layer, or over one layer of all domains, the "
        "median would make that 50 %, so it was neither; a pool of the whole model can give them."
    )
    header = ["statement", "paper", "here"]
    return Section(
        title="What the paper states and what is seen", note=note, header=header, rows=rows
    )


def _list(fractions: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in fractions.items())


def _seen_specialised(analysis: Analysis) -> str:
    if analysis.specialisation is None:
        return "needs two domains"
    fraction = analysis.specialisation.of(PAPER)
    if not fraction.reachable:
        return f"out of reach with {analysis.specialisation.domains} domains"
    chance = ""
    if analysis.shuffled is not None:
        chance = f" (shuffled text: {analysis.shuffled.of(PAPER).overall:.1%})"
    return f"{fraction.overall:.1%}{chance}"


def _seen_speedup(analysis: Analysis) -> str:
    factors = [s for s in analysis.speedups if s.pool == "model"]
    paper_own = max(s.paper for s in factors)
    amdahl = max(s.amdahl for s in factors)
    return (
        f"by that formula {paper_own:.2f}x; of the whole model's FLOPs {amdahl:.2f}x "
        f"(ceiling {analysis.size.speedup(1.0):.2f}x); wall clock: `sparse-pathways benchmark`"
    )


def _seen_cosine(analysis: Analysis) -> str:
    if analysis.experiments is None:
        return "not measured"
    parts = []
    rows = analysis.experiments.preservation
    for rule in dict.fromkeys(row.rule for row in rows):
        own = [row.cosine for row in rows if row.rule == rule]
        parts.append(f"{rule} {min(own):.4f} to {max(own):.4f}")
    return "; ".join(parts)


def _seen_selection(analysis: Analysis) -> str:
    rows = analysis.experiments.selection if analysis.experiments else ()
    if not rows:
        return "not measured"
    negative = {(r.domain, r.sparsity): r.divergence for r in rows if r.rule == NEGATIVE}
    positive = {(r.domain, r.sparsity): r.divergence for r in rows if r.rule == POSITIVE}
    better = sum(negative[key] < positive[key] for key in negative)
    return f"nearer to dense (KL) in {better} of {len(negative)} cases"

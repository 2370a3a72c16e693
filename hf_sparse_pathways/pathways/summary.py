"""Pathways in words: a row per domain, of what it keeps and of what it was made from."""

from typing import TYPE_CHECKING, Any

from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank, SharedColumns
from hf_sparse_pathways.ffn.clusters import experts_of
from hf_sparse_pathways.ffn.neuron_groups import NeuronGroups
from hf_sparse_pathways.shares import format_share
from hf_sparse_pathways.tables import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

HEADER = (
    "domain",
    "neurons removed",
    "per block",
    "FFN FLOPs",
    "compensation",
    "method",
    "tokens",
    "documents",
    "text",
)


def describe_pathways(pathways: "Pathways") -> Table:
    """Return a table of the domains, and of the controls behind them."""
    controls = {f"{name} (control)": name for name in pathways.controls}
    shown = {**{name: name for name in pathways.domains}, **controls}
    base = pathways.base
    return Table(
        title=f"Pathways of {base.title}",
        note=f"{base.summary}. FFN FLOPs: of the dense FFN's.",
        header=HEADER,
        rows=[[title, *_describe_one(pathways, name)] for title, name in shown.items()],
    )


def block_table(pathways: "Pathways") -> Table:
    """Return a table of what each domain and control removes of every FFN block."""
    names = [*pathways.domains, *pathways.controls]
    shares = [pathways.sparsity(name, per_block=True) for name in names]
    return Table(
        title="Neurons removed of every FFN block",
        note="",
        header=["block", *names],
        rows=[
            [block.name, *(format_share(own[index], 1) for own in shares)]
            for index, block in enumerate(pathways.base.blocks)
        ],
    )


def _describe_one(pathways: "Pathways", name: str) -> list[str]:
    pathway = pathways[name]
    text = text_of(pathway)
    shares = pathways.sparsity(name, per_block=True)
    return [
        format_share(pathways.sparsity(name), 1) if shares else "-",
        f"{format_share(min(shares))}-{format_share(max(shares))}" if shares else "-",
        format_share(pathways.flops(name), 1),
        describe_compensation(pathway),
        str(pathway.provenance.get("method", "-")),
        *(str(text.get(key, "-")) for key in ("tokens", "documents", "source")),
    ]


def text_of(pathway: "Pathway") -> dict[str, Any]:
    """Return what a pathway says of its calibration text; nothing if that is no object."""
    text = pathway.provenance.get("text")
    return text if isinstance(text, dict) else {}


def describe_compensation(pathway: "Pathway") -> str:
    """Say what a pathway adds to what it keeps: by its blocks, not by its provenance."""
    experts = [expert for block in pathway.blocks for expert in experts_of(block)]
    clusters = "" if pathway.clusters == 1 else f" in {pathway.clusters} clusters"
    if pathway.provenance.get("experts") == "copies":
        return f"{_pruned(pathway.provenance)}{clusters}"
    parts = {part: None for expert in experts for part in _added(expert)}
    return ("+".join(parts) or "none") + clusters


def _pruned(provenance: "Mapping[str, Any]") -> str:
    """Name pruned copies, whose FLOPs the paper counts by the weights that are not zero."""
    nonzero = provenance.get("nonzero_flops")
    counted = f" ({format_share(nonzero, 1)} not zero)" if isinstance(nonzero, float) else ""
    return f"copies pruned {provenance.get('pattern', '')}{counted}"


def _routed(groups: NeuronGroups | None) -> str:
    return "" if groups is None else f"{groups.top_k} of {groups.count} groups"


def _added(block: BlockPathway) -> list[str]:
    """Name what is added to one block, as ``compensation`` spells it."""
    refit = "shared" if isinstance(block.delta, SharedColumns) else "refit"
    if isinstance(block.delta, LowRank):
        refit = f"patch:{block.delta.rank}"
    bypass = "" if block.bypass is None else f"bypass:{block.bypass.rank}"
    named = {
        refit: block.delta is not None,
        "bias": block.bias is not None,
        bypass: block.bypass is not None,
        "healed rows": any(delta is not None for delta in block.incoming),
        "skipping": block.skipping is not None,
        _routed(block.groups): block.groups is not None,
    }
    return [name for name, there in named.items() if there]

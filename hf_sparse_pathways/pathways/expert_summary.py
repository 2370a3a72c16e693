"""What pathways keep of routed experts, in words: a row per domain, or per layer."""

from typing import TYPE_CHECKING

from hf_sparse_pathways.shares import format_share
from hf_sparse_pathways.tables import Table

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.kept_experts import ExpertsShape
    from hf_sparse_pathways.pathways.pathway import Pathways


def describe_experts(pathways: "Pathways") -> list[Table]:
    """Return a table of what each domain and control keeps of every layer's experts, if any does.

    An entry is the number of experts, and behind x the neurons of each where not all are kept.
    """
    held = {
        name: pathways[name].experts
        for name in [*pathways.domains, *pathways.controls]
        if pathways[name].experts
    }
    if not held:
        return []
    weights = sum(shape.weights for shape in pathways.base.experts)
    removed = ", ".join(f"{name} {_describe_removed(pathways, name)}" for name in held)
    rows = []
    for index, shape in enumerate(pathways.base.experts):
        row = [shape.name, _describe_shape(shape)]
        for experts in held.values():
            kept = experts[index]
            row.append(f"{kept.kept}" if kept.width is None else f"{kept.kept} x {kept.width}")
        rows.append(row)
    return [
        Table(
            title="Routed experts kept",
            note=f"Of their {weights / 1e6:.3g} M weights removed: {removed}.",
            header=["experts", "a token has", *held],
            rows=rows,
        )
    ]


def _describe_removed(pathways: "Pathways", name: str) -> str:
    share = format_share(pathways.expert_sparsity(name), 1)
    return f"{share} ({pathways.expert_weights(name) / 1e6:.3g} M left)"


def _describe_shape(shape: "ExpertsShape") -> str:
    """Say how many experts a token has, and in how many channels if these are several."""
    top_k, experts = (count // shape.channels for count in (shape.top_k, shape.experts))
    told = f"{top_k} of {experts} x {shape.d_ff}"
    return told if shape.channels == 1 else f"{told}, {shape.channels} times"

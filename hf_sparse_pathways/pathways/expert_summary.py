"""What pathways keep of routed experts, in words: a row per domain, or per layer."""

from typing import TYPE_CHECKING

from hf_sparse_pathways.shares import format_share
from hf_sparse_pathways.tables import Table

if TYPE_CHECKING:
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
    removed = ", ".join(
        f"{name} {format_share(pathways.expert_sparsity(name), 1)}" for name in held
    )
    rows = []
    for index, shape in enumerate(pathways.base.experts):
        row = [shape.name, f"{shape.top_k} of {shape.experts} x {shape.d_ff}"]
        for experts in held.values():
            kept = experts[index]
            row.append(f"{kept.kept}" if kept.width is None else f"{kept.kept} x {kept.width}")
        rows.append(row)
    return [
        Table(
            title="Routed experts kept",
            note=f"Of their neurons removed: {removed}.",
            header=["experts", "a token has", *held],
            rows=rows,
        )
    ]

"""The ``sliced`` executor: a pathway's runs of neurons computed on views of the weights.

A run of rows of an incoming leaf, or of columns of the outgoing leaf, is a view that takes no
memory; activations of several runs are joined, outputs are added up. Biases, low-rank changes and
the bypass are added as ``masked`` adds them. Two things are copied as ``compact`` does, leaf by
leaf: weights that the pathway changes in full (a refit that is no patch), and blocks whose kept
neurons are more than ``MOST_RUNS`` runs, as they are unless they were permuted. A batch of mixed
pathways is masked, which takes no memory either.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.ffn.additions import needed_input
from hf_sparse_pathways.ffn.group_products import Selected
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.ffn.routing import Routing
from hf_sparse_pathways.ffn.runs import Run
from hf_sparse_pathways.ffn.stored import is_int8

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.executors import Compact
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf


class Sliced:
    """Compute with views of the kept rows and columns where there are some."""

    def __init__(self, copying: "Compact") -> None:
        """Take what computes leaves that have no views."""
        self._copying = copying
        self.form, self.everywhere = copying.form, False
        self.route, self.skip = copying.route, copying.skip

    def incoming(self, leaf: "PathwayLeaf", x: Tensor, pathway: Any) -> Tensor:
        """Compute the kept neurons alone, run by run."""
        runs = _runs(leaf, pathway)
        if runs is None:
            return self._copying.incoming(leaf, x, pathway)
        leaf.check_whole()
        weight, bias = linear_weight(leaf), leaf.bias
        outputs = [
            functional.linear(x, weight[start:stop], None if bias is None else bias[start:stop])
            for start, stop in _rows(runs, leaf)
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        change = leaf.state.change(pathway, leaf.position, leaf.rows_per_neuron, output)
        return output if change is None else output + change.product(x)

    def outgoing(
        self, leaf: "PathwayLeaf", x: Tensor, pathway: Any, block_input: Tensor | None
    ) -> Tensor:
        """Sum over the runs, and add the compensation."""
        runs = _runs(leaf, pathway)
        if runs is None:
            return self._copying.outgoing(leaf, x, pathway, block_input)
        leaf.check_whole()
        weight, bias, done = linear_weight(leaf), leaf.bias, 0
        outputs = []
        for start, stop in runs:
            part = x[..., done : done + stop - start]
            outputs.append(functional.linear(part, weight[:, start:stop], bias))
            bias, done = None, done + stop - start
        output = sum(outputs[1:], start=outputs[0])
        if not leaf.state.members.all[pathway].compensated:
            return output
        addition = leaf.state.addition(pathway, output)
        if addition.delta is not None:
            output = output + addition.delta(x)  # type: ignore[operator]
        if addition.bias is not None:
            output = output + addition.bias
        if addition.bypass is not None:
            output = output + addition.bypass(needed_input(block_input))
        return output


def has_views(leaf: "PathwayLeaf", pathway: int) -> bool:
    """Whether a leaf needs no copy for a pathway."""
    return _runs(leaf, pathway) is not None


def _runs(leaf: "PathwayLeaf", pathway: int | Routing | Selected) -> tuple[Run, ...] | None:
    """Return the runs of neurons of which a leaf has views, or None if it is copied."""
    if isinstance(pathway, Routing | Selected) or pathway >= len(leaf.state.pathways):  # experts
        return None
    own = leaf.state.members.all[pathway]
    changes = (own.delta,) if leaf.neuron_dim == 1 else own.incoming[leaf.position :][:1]
    if any(isinstance(change, Tensor) for change in changes) or is_int8(leaf.weight):
        return None
    return leaf.state.members.runs[pathway]


def _rows(runs: tuple[Run, ...], leaf: "PathwayLeaf") -> list[Run]:
    """Return the rows of runs of neurons; in a fused matrix the gate's, then up's."""
    shifts = [part * leaf.state.d_ff for part in range(leaf.rows_per_neuron)]
    return [(start + shift, stop + shift) for shift in shifts for start, stop in runs]

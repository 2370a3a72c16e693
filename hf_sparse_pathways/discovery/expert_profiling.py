"""Statistics of routed experts: one more pass over a domain's text, with hooks on the experts.

A hook sees which expert each token is routed to, and with what weight. Every expert is then
computed for its tokens by its own class's forward, twice: as it is, which gives its output, and
with the identity in place of the outgoing weights, which gives its activation; so whatever stands
between gate, up and down is the model's own code. A sgatlin layer is asked which experts it takes.
"""

import logging
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.collection import Collection, Sample
from hf_sparse_pathways.discovery.collectors import Collector
from hf_sparse_pathways.discovery.expert_statistics import TENSORS, ExpertStatistics
from hf_sparse_pathways.ffn.blocks import survey_model
from hf_sparse_pathways.ffn.expert_layouts import cut_experts, find_parameter
from hf_sparse_pathways.ffn.experts import RoutedExperts
from hf_sparse_pathways.ffn.kept_experts import ExpertsShape
from hf_sparse_pathways.processes import Processes
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN
from hf_sparse_pathways.sgatlin.rows import multiply_rows

logger = logging.getLogger(__name__)


def collect_experts(
    run: Collection, domain: str, sample: Sample, work_folder: "str | PathLike[str] | None"
) -> tuple[ExpertStatistics, ...]:
    """Run a domain's windows through the decoder; return one entry per layer with routed experts.

    Args:
        run: What the passes over all domains' text have in common; the model is left as it was.
        domain: The domain.
        sample: Its text.
        work_folder: Where unfinished sums are stored.

    Returns:
        Nothing where weights of experts are offloaded, so that they cannot be computed apart.
    """
    experts = survey_model(run.model).experts
    if any(weight.is_meta for found in experts for weight in found.module.parameters()):
        logger.warning(
            "Domain %r: routed experts are not profiled, since their weights are offloaded.", domain
        )
        return ()
    if not experts:
        return ()
    collectors = [make_collector(found) for found in experts]
    done = run.sum_through(domain, sample, work_folder, "experts", collectors)
    return tuple(collector.statistics for collector in done)


class ExpertCollector(Collector):
    """Accumulates the statistics of one layer's experts: sums of its own, added to in place."""

    def __init__(self, found: RoutedExperts) -> None:
        super().__init__()
        self.found = found
        self.statistics = ExpertStatistics.empty(ExpertsShape.of(found, ""))

    def attach(self) -> list[Any]:
        """Hook the experts; return the handles."""
        return [self.found.module.register_forward_pre_hook(self._see)]

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.add(module, args)
        tokens = self.statistics.tokens + self.real_tokens
        self.statistics = replace(self.statistics, tokens=tokens)
        self.batches += 1

    def add(self, module: Any, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        """Add what the experts are given."""
        hidden, index, weights = (self.real(own.reshape(-1, own.shape[-1])) for own in args)
        sums = self.statistics
        for expert in torch.unique(index).tolist():
            tokens, places = torch.where(index == expert)
            output, activation = compute_expert(self.found, expert, hidden[tokens])
            weight, output = weights[tokens, places].double(), output.double()
            sums.routed[expert] += len(tokens)
            sums.weight_sum[expert] += weight.sum().cpu()
            sums.reap_sum[expert] += (weight * output.norm(dim=1)).abs().sum().cpu()
            sums.output_sum[expert] += output.sum(0).cpu()
            sums.abs_sum[expert] += activation.double().abs().sum(0).cpu()

    def state(self) -> dict[str, Tensor]:
        """Return all sums by name, to be stored; ``restore`` takes them back."""
        tokens = torch.tensor(self.statistics.tokens)
        return {"tokens": tokens, **{name: getattr(self.statistics, name) for name in TENSORS}}

    def restore(self, state: dict[str, Tensor], batches: int) -> None:
        """Go on from stored sums, in place."""
        sums = {name: state[name].clone() for name in TENSORS}
        self.statistics = ExpertStatistics(tokens=int(state["tokens"]), **sums)
        self.batches = batches

    def combine(self, processes: Processes) -> None:
        """Add the sums of all processes, in place; each then has those of all."""
        self.restore({name: processes.add_up(sums) for name, sums in self.state().items()}, 0)


class LinearCollector(ExpertCollector):
    """Accumulates the statistics of one sgatlin layer's experts."""

    def add(self, module: Any, args: tuple[Any, ...]) -> None:
        """Add what the layer is given."""
        hidden = self.real(args[0])
        scores, index = module.route(hidden)
        rows = module.rows(index).flatten(1)
        products = multiply_rows(module.u.flatten(0, 1), rows, hidden.to(module.u.dtype))
        norms = module.v.flatten(0, 1).double().norm(dim=1)[rows]
        weights, products = scores.flatten(1).double(), products.double().abs()
        sums, places = self.statistics, rows.flatten().cpu()
        for total, values in (
            (sums.routed, torch.ones_like(weights)),
            (sums.weight_sum, weights),
            (sums.reap_sum, weights.abs() * products * norms),
            (sums.abs_sum.squeeze(1), products),
        ):
            total.index_add_(0, places, values.flatten().cpu())


def make_collector(found: RoutedExperts) -> ExpertCollector:
    """Return what accumulates the statistics of a layer's experts."""
    return (LinearCollector if isinstance(found.module, SgatlinFFN) else ExpertCollector)(found)


def compute_expert(found: RoutedExperts, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return an expert's output ``(tokens, d_out)`` and its activation ``(tokens, d_ff)``.

    Args:
        found: The layer's experts.
        expert: Which one.
        tokens: Its input ``(tokens, d_in)``.
    """
    width = min(found.packed.d_ff, found.packed.d_out)
    pieces = torch.split(torch.arange(found.packed.d_ff, device=tokens.device), width)
    activation = [_run(found, expert, tokens, piece)[:, : len(piece)] for piece in pieces]
    return _run(found, expert, tokens, None), torch.cat(activation, dim=1)


def _run(found: RoutedExperts, expert: int, tokens: Tensor, piece: Tensor | None) -> Tensor:
    """Run one expert, whole, or as far as the activation of some of its neurons."""
    own_expert = torch.tensor([expert], device=tokens.device)
    neurons = None if piece is None else piece.unsqueeze(0)
    tensors = {
        packing.name: packing.take(find_parameter(found.module, packing.name), own_expert, neurons)
        for packing in found.packed.packings
    }
    if piece is not None:
        outgoing = found.packed.packings[0]
        tensors[outgoing.name] = _identity(tensors[outgoing.name])
        bias = f"{outgoing.name}_bias"
        tensors |= {bias: torch.zeros_like(tensors[bias])} if bias in tensors else {}
    own = _own_class(found.module)
    width = found.packed.d_ff if piece is None else len(piece)
    module: Any = cut_experts(found.module, own, tensors, 1, width)
    index = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)
    weights = torch.ones(len(tokens), 1, dtype=tokens.dtype, device=tokens.device)
    output: Tensor = own.forward(module, tokens, index, weights)
    return output.reshape(len(tokens), -1)


def _identity(weight: Tensor) -> Tensor:
    """Return the identity in the shape of outgoing weights, in either order."""
    ones = torch.eye(*weight.shape[-2:], dtype=weight.dtype, device=weight.device)
    return ones.expand_as(weight)


def _own_class(module: Any) -> Any:
    """Return the class of experts as the model has it, whether they are swapped or not."""
    state = getattr(module, "expert_state", None)
    return type(module) if state is None else state.own

"""Random expert pathways, and plain models that compute them: without experts, with zeroed neurons.

Nothing of these oracles masks a router: experts are taken out of the model, as a pruned checkpoint
would not have them. Where the router judges groups of experts, they stay and their score is minus
infinity, which is what "the router gives them minus infinity" means there.
"""

import copy
import math

import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks, survey_model
from hf_sparse_pathways.ffn.expert_layouts import find_parameter
from hf_sparse_pathways.pathways.base import BaseModel
from tests.architectures import compensate, random_masks, repaired

KINDS = ("experts", "neurons", "both")


def draw_experts(shape, generator, kind):
    """Return what is kept of a layer at random: half of the experts, a third of the neurons."""
    keep = torch.ones(shape.groups, shape.experts // shape.groups, dtype=torch.bool)
    if kind != "neurons":
        keep[:] = False
        for group in keep:
            count = max(shape.least_per_group, len(group) // 2)
            group[torch.randperm(len(group), generator=generator)[:count]] = True
    keep = keep.flatten()
    if kind == "experts":
        return sp.KeptExperts(keep=keep)
    neurons = torch.zeros(shape.experts, shape.d_ff, dtype=torch.bool)
    for expert in keep.nonzero().flatten():
        chosen = torch.randperm(shape.d_ff, generator=generator)[: shape.d_ff // 3 + 1]
        neurons[expert, chosen] = True
    return sp.KeptExperts(keep=keep, neurons=neurons)


def expert_pathways(model, kinds=KINDS, seed=0):
    """Return pathways of one domain per kind, with random repaired FFN blocks besides."""
    generator = torch.Generator().manual_seed(seed)
    shapes = BaseModel.of(model).experts
    pathways = compensate(model, random_masks(model, kinds))
    return pathways.with_experts(
        {kind: [draw_experts(shape, generator, kind) for shape in shapes] for kind in kinds}
    )


def pruned(model, pathway):
    """Return a plain model that has a pathway's experts and neurons only."""
    reference = repaired(model, pathway) if find_blocks(model) else copy.deepcopy(model)
    for found, kept in zip(survey_model(reference).experts, pathway.experts, strict=True):
        _silence(found, kept)
        if found.groups > 1:
            _forbid(found, kept)
        else:
            _take_out(found, kept)
    return reference


@torch.no_grad()
def _silence(found, kept):
    """Zero the removed neurons' outgoing weights."""
    if kept.neurons is None:
        return
    packing = found.packed.packings[0]
    weight = packing.apart(find_parameter(found.module, packing.name))
    removed = ~kept.neurons
    weight.masked_fill_(removed.unsqueeze(3 - packing.dim), 0)


@torch.no_grad()
def _take_out(found, kept):
    """Leave the removed experts, and their rows of the router, out."""
    count = found.packed.experts
    for packing in found.packed.packings:
        holder, _, name = packing.name.rpartition(".")
        holder = found.module.get_submodule(holder)
        own = packing.apart(getattr(holder, name))[kept.keep]
        setattr(holder, name, torch.nn.Parameter(own.flatten(0, 1) if packing.flat else own))
    found.module.num_experts = kept.kept
    for module in found.router.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and count in tensor.shape:
                    own = tensor[kept.keep] if len(tensor) == count else tensor[..., kept.keep]
                    tensors[name] = type(tensor)(own)
        for name in {"num_experts", "n_routed_experts"} & vars(module).keys():
            setattr(module, name, kept.kept)


@torch.no_grad()
def _forbid(found, kept):
    """Let the router of a model with groups give the removed experts minus infinity."""
    router = found.router
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[~kept.keep] = -math.inf
        return

    def choose(hidden):  # of deepseek_v2: probabilities among those left, then groups
        logits = hidden.view(-1, router.hidden_dim).float() @ router.weight.float().T
        scores = logits.masked_fill(~kept.keep, -math.inf).softmax(-1)
        groups = scores.unflatten(-1, (found.groups, -1))
        best = groups.amax(-1).topk(found.top_groups).indices
        inside = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best, True)
        values, index = (groups * inside.unsqueeze(-1)).flatten(1).topk(found.top_k)
        return logits, values * router.routed_scaling_factor, index

    router.forward = choose

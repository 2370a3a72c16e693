"""Pathways whose kept neurons are groups, at random, and a plain model that computes them."""

from dataclasses import replace

import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.neuron_groups import ALWAYS, NeuronGroups
from tests.architectures import repaired

GROUPS, TOP_K, SIZE = 4, 2, 3


def grouped(pathways, name="code", seed=0):
    """Return the pathways, one of which gives a token two of four groups of some neurons."""
    generator = torch.Generator().manual_seed(seed)
    blocks = tuple(
        replace(block, incoming=(), groups=_draw(block, shape, generator))
        for block, shape in zip(pathways[name].blocks, pathways.base.blocks, strict=True)
    )
    own = replace(pathways[name], blocks=blocks)
    return replace(pathways, by_domain={**pathways.by_domain, name: own})


def _draw(block, shape, generator):
    numbers = torch.arange(GROUPS, dtype=torch.int32).repeat(min(SIZE, (block.kept - 1) // GROUPS))
    always = torch.full((block.kept - len(numbers),), ALWAYS, dtype=torch.int32)
    group = torch.cat([numbers, always])[torch.randperm(block.kept, generator=generator)]
    return NeuronGroups(
        group=group,
        weight=torch.randn(GROUPS, shape.d_in, generator=generator) * 0.3,
        bias=torch.randn(GROUPS, generator=generator) * 0.1,
        share=torch.full((GROUPS,), TOP_K / GROUPS),
        top_k=TOP_K,
    )


def factors_of(groups, x):
    """Return what a token's kept activation is multiplied by, one token and neuron at a time."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]).float():
        logits = groups.weight @ token + groups.bias
        best = sorted(range(len(logits)), key=lambda g: -logits[g].item())[: groups.top_k]
        total = sum(logits[g].exp() for g in best)
        weights = {g: len(best) * logits[g].exp() / total for g in best} | {ALWAYS: 1.0}
        rows.append(torch.stack([torch.as_tensor(weights.get(int(g), 0.0)) for g in groups.group]))
    return torch.stack(rows).view(*x.shape[:-1], -1)


def weigh_leaves(first, outgoing, part):
    """Weight what a plain outgoing module is given, as a block's pathway does."""
    inputs = []

    def weigh(_module, args):
        factors = torch.ones_like(args[0])
        factors[..., part.keep] = factors_of(part.groups, inputs.pop()).to(factors)
        return (args[0] * factors, *args[1:])

    first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    outgoing.register_forward_pre_hook(weigh)


def reference(model, pathway):
    """Return a plain copy that computes a pathway, each token with its groups."""
    result = repaired(model, sp.Pathway(blocks=pathway.blocks))
    for block, part in zip(find_blocks(result), pathway.blocks, strict=True):
        weigh_leaves(block.incoming[0], block.outgoing, part)
    return result

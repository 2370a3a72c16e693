"""Pathways whose tokens are clustered, at random, and a plain model that computes them."""

import copy
from dataclasses import replace

import torch
from torch import nn

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, TokenRouter, experts_of
from tests.architectures import compensate, random_masks, repaired

CLUSTERS = 3


def clustered(model, seed=0, *, change_rows=True, shared=False):
    """Return pathways of a domain with clusters, ``code``, and one without, ``law``.

    Experts differ in width, and have every compensation; changed rows if wanted, and if wanted one
    refit for all.
    """
    keeps = (0.5, 0.5, 0.3)
    made = [
        compensate(model, random_masks(model, ("code", "law"), keep, seed + number), seed + number)
        for number, keep in enumerate(keeps)
    ]
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for index, shape in enumerate(made[0].base.blocks):
        router = TokenRouter.nearest(
            centroids=torch.randn(CLUSTERS, 4, generator=generator),
            components=torch.linalg.qr(torch.randn(shape.d_in, 4, generator=generator))[0].T,
            mean=torch.randn(shape.d_in, generator=generator) * 0.1,
            share=torch.tensor([0.5, 0.3, 0.2]),
        )
        experts = tuple(pathways["code"].blocks[index] for pathways in made)
        if not change_rows:
            experts = tuple(replace(expert, incoming=()) for expert in experts)
        common = None
        if shared:
            experts = tuple(replace(expert, delta=None) for expert in experts)
            common = torch.randn(shape.d_out, shape.d_ff, generator=generator) * 0.1
        blocks.append(ClusteredBlock(router=router, experts=experts, shared=common))
    code = sp.Pathway(blocks=tuple(blocks), provenance={"method": "drawn"})
    return sp.Pathways(base=made[0].base, by_domain={"code": code, "law": made[0]["law"]})


def reference(model, pathway):
    """Return a plain copy that computes a clustered pathway: all experts, then each token's own."""
    count = len(pathway.blocks[0].experts)
    copies = [
        repaired(model, sp.Pathway(blocks=tuple(experts_of(b)[number] for b in pathway.blocks)))
        for number in range(count)
    ]
    result = copy.deepcopy(model)
    parents = [[block.parent for block in find_blocks(made)] for made in copies]
    inputs = [[block.incoming[0] for block in find_blocks(made)] for made in copies]
    for index, block in enumerate(find_blocks(result)):
        experts = [own[index] for own in parents]
        block.parent.forward = _Chooser(experts, inputs[0][index], pathway.blocks[index].router)
    return result


class _Chooser:
    """Calls every expert's module, and takes each token from the expert that it is routed to."""

    def __init__(self, experts, incoming, router):
        self.experts, self.router = nn.ModuleList(experts), router
        incoming.register_forward_pre_hook(self._see)

    def _see(self, _, args):
        self.seen = args[0]

    def __call__(self, *args, **kwargs):
        results = [expert(*args, **kwargs) for expert in self.experts]
        outputs = [result[0] if isinstance(result, tuple) else result for result in results]
        distances = self.seen.double() @ self.router.weight.double().T + self.router.bias.double()
        chosen = distances.argmax(-1).view(*outputs[0].shape[:-1], 1)
        output = sum(out * (chosen == number) for number, out in enumerate(outputs))
        first = results[0]
        return (output, *first[1:]) if isinstance(first, tuple) else output

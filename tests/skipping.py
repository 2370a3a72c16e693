"""Pathways that skip neurons token by token, at random, and a plain model that computes them."""

from dataclasses import replace

import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.block_pathway import Skipping
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.clusters import ClusteredBlock
from tests.architectures import repaired


def skipping(pathways, ids, model, name="code"):
    """Return the pathways, of which one skips about half of its kept neurons on a text."""
    gates = [g.flatten(0, -2) for g in _gates(model, ids)]
    blocks = []
    for block, gate in zip(pathways[name].blocks, gates, strict=True):
        if isinstance(block, ClusteredBlock):
            blocks.append(replace(block, experts=tuple(_skip(e, gate) for e in block.experts)))
        else:
            blocks.append(_skip(block, gate))
    own = replace(pathways[name], blocks=tuple(blocks))
    return replace(pathways, by_domain={**pathways.by_domain, name: own})


def _skip(block, gate):
    threshold = gate.median(0).values[block.keep].float()
    return replace(block, skipping=Skipping(threshold=threshold, active=torch.tensor([0.5])))


def _gates(model, ids):
    """Return |h| of every block on a text, dense."""
    blocks, seen = find_blocks(model), {}
    handles = []
    for index, block in enumerate(blocks):
        handles += _see(block, lambda gate, index=index: seen.update({index: gate}), None)
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [seen[index] for index in range(len(blocks))]


def _see(block, see, threshold):
    """Hook a plain block: its gate is seen, and thresholded if a vector ``(d_ff,)`` is given."""
    fused = block.layout.fused
    up = block.incoming[-1] if fused or len(block.incoming) > 1 else None
    return _hook(up, block.outgoing, see, threshold, block.d_ff if fused else 0)


def _hook(up, outgoing, see, threshold, start):
    ups = {}

    def see_up(_module, _args, output):
        ups["up"] = output[..., start:]

    def change(_module, args):
        gate = args[0].abs() / ups["up"].abs() if ups else args[0].abs()
        see(gate)
        if threshold is None:
            return args
        kept = torch.where(gate > threshold, args[0], torch.zeros_like(args[0]))
        return (kept, *args[1:])

    handles = [outgoing.register_forward_pre_hook(change)]
    return handles if up is None else [*handles, up.register_forward_hook(see_up)]


def threshold_leaves(up, outgoing, part):
    """Threshold what a plain outgoing module is given, as a block's pathway does."""
    threshold = torch.full(part.keep.shape, -1.0)
    threshold[part.keep] = part.skipping.threshold
    _hook(up, outgoing, lambda _: None, threshold, 0)


def reference(model, pathway):
    """Return a plain copy that computes a pathway, each token without what it skips."""
    result = repaired(model, sp.Pathway(blocks=pathway.blocks))
    for block, part in zip(find_blocks(result), pathway.blocks, strict=True):
        threshold = torch.full((block.d_ff,), -1.0)
        threshold[part.keep] = part.skipping.threshold
        _see(block, lambda _: None, threshold)
    return result

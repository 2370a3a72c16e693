"""Bring your own masks: keep the neurons whose output weights are largest, and see what it costs.

Usage: python examples/own_masks.py MODEL
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks


def main(name: str) -> None:
    """Compare dense and masked next-token losses on one sentence."""
    dense = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)

    masks = []
    for block in find_blocks(dense):
        weight = block.outgoing.weight
        columns = weight if weight.shape[1] == block.d_ff else weight.T
        norms = columns.detach().norm(dim=0)
        masks.append(norms > norms.quantile(0.2))

    pathways = sp.Pathways.from_masks(dense, {"large-norm": masks})
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    inputs = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    with torch.no_grad():
        for domain in (None, "large-norm"):
            loss = model(**inputs, labels=inputs["input_ids"], domain=domain).loss
            print(f"{domain or 'dense'}: loss {loss.item():.3f}")
    print(f"FFN FLOPs kept: {pathways.flops('large-norm'):.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])

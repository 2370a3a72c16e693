"""Bring your own score and allocation, and measure them beside the default on held-out text.

Usage: python examples/own_method.py MODEL CALIBRATION HELD_OUT   (two files or folders of text)
"""

import sys
from collections.abc import Sequence

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.allocation import BlockCosts, Budget
from hf_sparse_pathways.discovery.scores import ScoreInput


def output_power(given: ScoreInput) -> Tensor:
    """Score a neuron by the power of what it adds to the output: larger means keep."""
    return given.statistics.second_moment * given.down.double().square().sum(dim=0)


def spare_first_block(blocks: Sequence[BlockCosts], budget: Budget) -> list[int]:
    """Keep all of the first block, and the same fraction of every other one."""
    first, *others = (block.d_ff for block in blocks)
    rest = (budget.kept * (first + sum(others)) - first) / sum(others)
    return [first, *(int(rest * d_ff) for d_ff in others)]


def main(name: str, calibration: str, held_out: str) -> None:
    """Compare the default with the own method, the own one repaired too."""
    dense = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    profile = sp.profile(dense, tokenizer, {"mine": calibration}, max_tokens=8192)
    own = {"method": output_power, "allocation": spare_first_block}
    methods = {"default": {}, "own": own, "own, repaired": {**own, "compensation": "refit+bias"}}
    for label, options in methods.items():
        pathways = sp.select(dense, profile, sparsity=0.3, **options)
        model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
        report = sp.evaluate(model, tokenizer, {"mine": held_out}, max_tokens=4096)
        for row in report.rows:
            print(f"{label}: {row.role} {row.ratio:.3f} of dense, {row.flops:.0%} of the FLOPs")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Signatures at random."""

import torch

from hf_sparse_pathways.pathways.pairs import BYTES
from hf_sparse_pathways.pathways.signature import LENGTHS, LEVELS, Signature, no_margins


def make_signature(seed=0):
    """Return a signature of random weights over 99 tokens."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(len(LENGTHS), len(LEVELS), generator=generator).sort(dim=1).values
    return Signature(
        tokens=torch.randn(99, generator=generator).half(),
        own=grid,
        background=grid - 1.0,
        ignored=torch.tensor([0, 1], dtype=torch.int32),
        prefix=torch.tensor([5, 6], dtype=torch.int32),
        suffix=torch.tensor([7], dtype=torch.int32),
        pairs=torch.randint(256, (BYTES,), generator=generator).to(torch.uint8),
        own_pairs=torch.rand(len(LENGTHS), len(LEVELS), generator=generator).sort(dim=1).values,
        **{**no_margins(), **_margins(generator)},
    )


def _margins(generator):
    return {
        "peers": torch.randint(2**62, (2,), generator=generator),
        "margins": torch.rand(2, len(LENGTHS), generator=generator),
    }

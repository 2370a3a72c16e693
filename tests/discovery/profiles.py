"""Profiles made by hand, for tests of what is done with a profile."""

import torch

from hf_sparse_pathways.discovery.profiles import DomainProfile, Profile
from hf_sparse_pathways.discovery.statistics import BlockStatistics
from hf_sparse_pathways.pathways.base import BaseModel


def random_statistics(d_ff, generator, tokens=100):
    """Return the statistics of random activations, computed directly in float64."""
    return statistics_of(torch.randn(tokens, d_ff, generator=generator, dtype=torch.float64))


def statistics_of(activation):
    """Return the statistics of ``(tokens, d_ff)`` activations by their definitions."""
    values = activation.double()
    return BlockStatistics(
        tokens=len(values),
        abs_sum=values.abs().sum(0),
        sum=values.sum(0),
        square_sum=(values * values).sum(0),
        positive=(values > 0).double().sum(0),
        abs_max=values.abs().max(0).values,
        share_square_sum=(values / values.norm(dim=1, keepdim=True)).square().sum(0),
    )


def random_profile(model, domains=("code", "law"), seed=0):
    """Return a profile of random activations, another per domain and block."""
    base, generator = BaseModel.of(model), torch.Generator().manual_seed(seed)
    by_domain = {}
    for index, domain in enumerate(domains):
        blocks = tuple(
            random_statistics(block.d_ff, generator, 50 + 30 * index) for block in base.blocks
        )
        provenance = {
            "source": f"texts of {domain}",
            "documents": 2,
            "tokens": blocks[0].tokens,
            "seed": seed,
            "digests": [f"{domain}1", f"{domain}2"],
        }
        by_domain[domain] = DomainProfile(blocks=blocks, provenance=provenance)
    return Profile(base=base, by_domain=by_domain)

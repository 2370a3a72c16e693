"""Profiles to analyse."""

from dataclasses import replace

import torch

from tests.architectures import build, tiny_llama
from tests.discovery.profiles import random_profile, statistics_of


def skewed_profile(architecture="llama", domains=("code", "law", "medicine"), seed=0):
    """Return a profile of skewed activations: other neurons are loud in other domains."""
    model = tiny_llama() if architecture == "llama" else build(architecture)
    plain = random_profile(model, domains, seed)
    generator = torch.Generator().manual_seed(seed)
    by_domain = {
        name: replace(
            known,
            blocks=tuple(
                statistics_of(
                    torch.randn(40, len(block.sum), generator=generator)
                    * torch.rand(len(block.sum), generator=generator).pow(3)
                )
                for block in known.blocks
            ),
        )
        for name, known in plain.by_domain.items()
    }
    return replace(plain, by_domain=by_domain)

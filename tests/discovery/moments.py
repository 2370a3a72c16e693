"""Samples of one FFN block drawn at random, for tests of what is solved from second moments."""

from dataclasses import dataclass

import torch

from hf_sparse_pathways.discovery.grams import Gram
from hf_sparse_pathways.discovery.repair import BlockTask


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Raw samples, float64, and the task that is made of them.

    ``activation`` depends on ``block_input``; both have a mean. ``earlier`` is what blocks before
    have left wrong, or None.
    """

    activation: torch.Tensor
    block_input: torch.Tensor
    weight: torch.Tensor
    earlier: torch.Tensor | None = None
    metric: torch.Tensor | None = None

    @property
    def target(self):
        """What the block should compute of each sample."""
        own = self.activation @ self.weight.T
        return own if self.earlier is None else own + self.earlier

    @property
    def z(self):
        ones = torch.ones(len(self.activation), 1, dtype=torch.float64)
        return torch.cat([self.activation, self.block_input, ones], 1)

    @property
    def task(self):
        missing = None if self.earlier is None else self.earlier.T @ self.z / len(self.z)
        gram = Gram(self.z.T @ self.z, self.activation.shape[1])
        return BlockTask(weight=self.weight, gram=gram, missing=missing, metric=self.metric)


def draw_samples(d_ff=13, d_in=5, d_out=6, tokens=400, seed=0, earlier=False, metric=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    block_input = draw(tokens, d_in) + 0.3
    mixed = block_input @ draw(d_in, d_ff) + draw(tokens, d_ff) @ draw(d_ff, d_ff) * 0.3
    root = draw(d_out, d_out)
    return Samples(
        activation=mixed.relu() + 0.1 * draw(tokens, d_ff),
        block_input=block_input,
        weight=draw(d_out, d_ff),
        earlier=block_input @ draw(d_in, d_out) * 0.5 + draw(tokens, d_out) if earlier else None,
        metric=root @ root.T if metric else None,
    )


def draw_keep(d_ff, kept, seed=0):
    order = torch.randperm(d_ff, generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros(d_ff, dtype=torch.bool)
    keep[order[:kept]] = True
    return keep

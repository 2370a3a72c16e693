"""What is kept of a block after a prompt: rules from its activations to a pathway.

placeholder
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import FfnBlock


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBlock:
    """One FFN block and what a prompt does in it.

    Attributes:
        activations: Of the prompt's tokens, float32 ``(tokens, d_ff)``.
        block: The block.
        kept: How many neurons are to be kept.
        prior: What a domain's pathway keeps of the block, if one was named.
    """

    activations: Tensor
    block: FfnBlock
    kept: int
    prior: BlockPathway | None


def griffin(prompt: PromptBlock) -> BlockPathway:
    """Return the neurons with the largest shares of the tokens' activations.

    Source:
        Dong et al. 2024, arXiv:2404.01365: of the statistic |a_t,i| / |a_t| over the prompt's
        tokens t the largest norms stay.
    """
    norms = prompt.activations.norm(dim=1, keepdim=True).clamp_min(1e-9)
    used = (prompt.activations / norms).square().sum(0)
    return BlockPathway(keep=_largest(used, prompt.kept))


PromptRule = Callable[[PromptBlock], BlockPathway]

RULES: Mapping[str, PromptRule] = MappingProxyType({"griffin": griffin})
"""Every rule by its name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Picker:
    """Picks the neurons of a call's prompts.

    Attributes:
        rule: A name in ``RULES``.
        sparsity: Fraction of each block's neurons that is left out.
        blocks: The model's.
        priors: For each row what a domain's pathway keeps of each block; None without.
    """

    rule: str
    sparsity: float
    blocks: Sequence[FfnBlock]
    priors: Sequence[Sequence[BlockPathway] | None]

    def __call__(self, index: int, row: int, activations: Tensor) -> BlockPathway:
        """Return what is kept of a block after a prompt; see ``Pick``."""
        block, prior = self.blocks[index], self.priors[row]
        with torch.autocast(activations.device.type, enabled=False):
            prompt = PromptBlock(
                activations=activations.float(),
                block=block,
                kept=max(1, int((1.0 - self.sparsity) * block.d_ff + 1e-6)),
                prior=None if prior is None else prior[index],
            )
            return RULES[self.rule](prompt)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return where the largest of some values ``(d_ff,)`` are, bool, on the CPU."""
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[values.topk(count).indices.cpu()] = True
    return keep

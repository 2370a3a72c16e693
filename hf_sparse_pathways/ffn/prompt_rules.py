"""What is kept of a block after a prompt, and what makes good the rest: rules from activations.

GRIFFIN keeps the neurons with the largest shares of the prompt's activations a_t, as they are. What
the others did is regressed on the kept ones K, over the prompt's tokens t and with a ridge::

    minimise over D, b   sum_t |W a_t - (W'_K + D) a_t,K - b' - b|^2 + m E[a^2] |D|^2

where W'_K and b' are where it starts from: the weights as they are, or a domain's neurons with
their refit and bias. A ridge of m mean squares of the kept activations weighs as m tokens would: a
short prompt changes little. It is solved in the smaller of the tokens' and the neurons' dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.attached_block import AttachedBlock
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, as_matrix
from hf_sparse_pathways.ffn.leaves import is_offloaded
from hf_sparse_pathways.ffn.stored import Stored, lies_in_memory

PSEUDO_TOKENS = 512
"""m: so many tokens of no change the ridge weighs."""

PRIOR_TOKENS = 1024
"""The same where it starts from a domain's repair, which was fitted to much more text."""

PSEUDO_MEAN = 16
"""The same for the bias, which is but one mean."""

LEAST_RIDGE = 1e-9
"""Absolute: keeps blocks whose neurons never fire solvable."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBlock:
    """One FFN block and what a prompt does in it.

    Attributes:
        activations: Of the prompt's tokens, float32 ``(tokens, d_ff)``.
        attached: The block.
        kept: How many neurons are to be kept.
        prior: What a domain's pathway keeps of the block, if one was named.
    """

    activations: Tensor
    attached: AttachedBlock
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


def refit(prompt: PromptBlock) -> BlockPathway:
    """Return GRIFFIN's neurons, or a domain's, with columns and bias fitted to the prompt."""
    start = griffin(prompt) if prompt.prior is None else prompt.prior
    weight = _find_weight(prompt.attached).to(prompt.activations)
    keep = start.keep.to(weight.device)
    own, others = prompt.activations[:, keep], prompt.activations[:, ~keep]
    missing = others @ weight[:, ~keep].T
    delta = torch.zeros_like(weight[:, keep]) if start.delta is None else start.delta
    delta = as_matrix(delta).to(weight)
    missing -= own @ delta.T
    bias = 0.0 if start.bias is None else start.bias.to(weight)
    pseudo = PSEUDO_TOKENS if prompt.prior is None else PRIOR_TOKENS
    change, shift = _regress(missing - bias, own, pseudo)
    return BlockPathway(keep=start.keep, delta=delta + change, bias=bias + shift)


PromptRule = Callable[[PromptBlock], BlockPathway]

RULES: Mapping[str, PromptRule] = MappingProxyType({"griffin": griffin, "refit": refit})
"""Every rule by its name."""

WITH_PRIOR = ("refit",)
"""The rules that start from a domain's neurons where one is named."""


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
    blocks: Sequence[AttachedBlock]
    priors: Sequence[Sequence[BlockPathway] | None]

    def __call__(self, index: int, row: int, activations: Tensor) -> BlockPathway:
        """Return what is kept of a block after a prompt; see ``Pick``."""
        attached, prior = self.blocks[index], self.priors[row]
        share = (1.0 - self.sparsity) * attached.state.d_ff
        with torch.autocast(activations.device.type, enabled=False):
            prompt = PromptBlock(
                activations=activations.float(),
                attached=attached,
                kept=max(1, int(share + 1e-6)),
                prior=None if prior is None else prior[index],
            )
            return RULES[self.rule](prompt)


def _find_weight(attached: AttachedBlock) -> Tensor:
    """Return the outgoing leaf's weight, ``(d_out, d_ff)``.

    Raises:
        UnsupportedModelError: It does not lie in memory as what the block computes with.
    """
    *_, leaf = attached.leaves.values()
    if attached.state.masked_outside or is_offloaded(leaf) or not lies_in_memory(leaf.weight):
        raise UnsupportedModelError(
            f"The columns of {attached.block.name} cannot be fitted to a prompt: its outgoing leaf "
            "is wrapped by an adapter, offloaded, or of an unknown kind. Pick neurons as they are: "
            "model.set_prompt_pathways(rule='griffin')."
        )
    stored = Stored.of(leaf)
    values = stored.values.detach()
    return values if stored.scale is None else values.float() * stored.scale[:, None]


def _largest(values: Tensor, count: int) -> Tensor:
    """Return where the largest of some values ``(d_ff,)`` are, bool, on the CPU."""
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[values.topk(count).indices.cpu()] = True
    return keep


def _regress(target: Tensor, inputs: Tensor, pseudo: int) -> tuple[Tensor, Tensor]:
    """Return the ridge regression of a target ``(tokens, d_out)`` on ``(tokens, kept)``.

    Returns:
        Coefficients ``(d_out, kept)`` and bias ``(d_out,)``.
    """
    tokens, kept = inputs.shape
    ridge = pseudo * inputs.square().mean().clamp_min(LEAST_RIDGE)
    means = target.mean(0), inputs.mean(0)
    target, inputs = target - means[0], inputs - means[1]
    wide = tokens < kept
    gram = inputs @ inputs.T if wide else inputs.T @ inputs
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    if wide:
        change = torch.cholesky_solve(target, factor).T @ inputs
    else:
        change = torch.cholesky_solve(inputs.T @ target, factor).T
    shrunk = tokens / (tokens + PSEUDO_MEAN)
    return change, (means[0] - change @ means[1]) * shrunk

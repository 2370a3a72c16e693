"""A frozen model of which one pathway's routers are trained, and what they are trained by.

The masked pathway is differentiable in its routers, through the weights of the groups that are
chosen, and in its refitted columns. To the distillation two terms are added, means over the blocks
that have groups. With f_g the share of the choices that fall on group g and P_g the mean over
tokens of the softmax over all G logits l, they are::

    balance = G sum_g f_g P_g        z = mean (log sum_g exp l_g)^2

Source: the load-balancing loss of Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961; the
z-loss of Zoph et al. 2022, "ST-MoE", arXiv:2202.08906.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.windows import Batch
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.neuron_groups import NeuronGroups
from hf_sparse_pathways.healing.losses import Objective, count_scored
from hf_sparse_pathways.healing.router_settings import RouterSettings
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.pathway import Pathways


@dataclass(frozen=True)
class Routed:
    """What one block's router made of some tokens.

    Attributes:
        logits: ``(tokens, G)``.
        shares: f, the share of the choices that falls on each group, ``(G,)``.
    """

    logits: Tensor
    shares: Tensor

    @classmethod
    def of(cls, groups: NeuronGroups, x: Tensor) -> "Routed":
        """Route tokens ``(tokens, d_in)``."""
        logits = groups.logits(x)
        chosen, _ = groups.choose(logits.detach())
        counts = chosen.flatten().bincount(minlength=groups.count)
        return cls(logits, counts / chosen.numel())

    @property
    def balance(self) -> Tensor:
        """The load-balancing loss; 1 where all groups are chosen and wanted equally often."""
        return len(self.shares) * (self.shares * self.logits.softmax(-1).mean(0)).sum()

    @property
    def z(self) -> Tensor:
        """The z-loss."""
        return self.logits.logsumexp(-1).square().mean()


class RoutedStudent(nn.Module):
    """A frozen model whose routers, and refitted columns if wanted, are parameters.

    Attributes:
        trained: The parameters, by block and part: nothing else is part of the module's state.
    """

    def __init__(
        self, frozen: Any, pathways: Pathways, domain: str, settings: RouterSettings
    ) -> None:
        """Begin with what a pathway has.

        Args:
            frozen: The dense model, float32, as ``frozen_copy`` returns it.
            pathways: With the domain's, all of whose blocks are ``BlockPathway``.
            domain: Its name.
            settings: What is trained, and by which loss.
        """
        super().__init__()
        self.trained = nn.ParameterDict()
        device = next(frozen.parameters()).device
        blocks = [
            self._trainable(f"{number}", block, device, settings)
            for number, block in enumerate(pathways[domain].blocks)
        ]
        own = replace(pathways[domain], blocks=tuple(blocks), experts=(), signature=None)
        paths = replace(pathways, by_domain={domain: own}, controls={})
        paths = replace(paths, base=replace(paths.base, name="", revision=None))
        model = SparsePathwaysForCausalLM.from_dense(frozen, paths, executor="masked")
        found = zip(find_blocks(model), blocks, strict=True)
        routers = [(block.incoming[0], own.groups) for block, own in found if own.groups]
        self._held = (model.eval(), routers, Objective(terms=settings.text.terms, teacher=frozen))
        self._domain, self._settings = domain, settings

    def _trainable(
        self, name: str, block: Any, device: torch.device, settings: RouterSettings
    ) -> BlockPathway:
        """Return a block whose groups are routed by parameters."""
        if block.groups is None:
            return block
        values = {f"{name}_weight": block.groups.weight, f"{name}_bias": block.groups.bias}
        whole = settings.refit and isinstance(block.delta, Tensor)
        if whole:
            values[f"{name}_delta"] = block.delta
        for key, value in values.items():
            self.trained[key] = nn.Parameter(value.detach().to(device, torch.float32, copy=True))
        router = {"weight": self.trained[f"{name}_weight"], "bias": self.trained[f"{name}_bias"]}
        delta = self.trained[f"{name}_delta"] if whole else block.delta
        return replace(block, delta=delta, groups=replace(block.groups, **router))

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return the losses of a batch, means over its tokens, and what the routers did.

        Args:
            ids: ``(rows, tokens)``.
            mask: Which are text, bool.
        """
        model, _, objective = self._held
        batch = Batch(ids, mask, ())
        with self.routing(mask) as routed, model.pathway(self._domain):
            distance = objective(model, batch) / count_scored(batch)
        settings, loss = self._settings, distance
        balance = torch.stack([own.balance for own in routed]).mean()
        z = torch.stack([own.z for own in routed]).mean()
        if self.training:
            loss = distance + settings.balance * balance + settings.z_loss * z
        shares = [own.shares for own in routed]
        return {"loss": loss, "balance": balance, "z_loss": z, "shares": shares}

    @contextmanager
    def routing(self, mask: Tensor) -> Iterator[list[Routed]]:
        """Within the block, note what every router makes of a batch's tokens, padding left out."""
        rows, routed = mask.flatten().nonzero().flatten(), list[Routed]()

        def note(groups: NeuronGroups, x: Tensor) -> None:
            routed.append(Routed.of(groups, x.flatten(0, -2).index_select(0, rows)))

        with ExitStack() as stack:
            for leaf, groups in self._held[1]:

                def see(_: Any, args: Any, groups: NeuronGroups = groups) -> None:
                    note(groups, args[0])

                stack.callback(leaf.register_forward_pre_hook(see).remove)
            yield routed

    def blocks(
        self, before: tuple[BlockPathway, ...], shares: Mapping[int, Tensor], dtype: torch.dtype
    ) -> tuple[BlockPathway, ...]:
        """Return the pathway with what was learnt.

        Args:
            before: As it was.
            shares: By block, the share of tokens that have each group now.
            dtype: In which refits are stored.
        """
        learnt = {name: value.detach().cpu().clone() for name, value in self.trained.items()}
        made = []
        for number, block in enumerate(before):
            if block.groups is None:
                made.append(block)
                continue
            router = {part: learnt[f"{number}_{part}"] for part in ("weight", "bias")}
            groups = replace(block.groups, **router, share=shares[number].float().cpu())
            delta = learnt.get(f"{number}_delta")
            delta = block.delta if delta is None else delta.to(dtype)
            made.append(replace(block, groups=groups, delta=delta))
        return tuple(made)

"""Routers that choose among some experts only, whatever their form.

Routers differ (softmax before or after the choice, sigmoids with a correction, groups), but all of
them multiply tokens by a row per expert and most choose by ``topk``. While a router's own forward
runs, a function mode of torch gives the other experts minus infinity in both places: in the logits,
so that no probability goes to them, and in whatever the choice is made by, so that a correction or
a group's score cannot bring them back.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hf_sparse_pathways.errors import UnsupportedModelError

_CHOICES = (torch.topk, Tensor.topk)

_PRODUCTS = (functional.linear, torch.mm, torch.matmul, Tensor.matmul)


class Restriction(TorchFunctionMode):
    """Within the block, a router on this thread gives some experts minus infinity.

    Attributes:
        seen: Whether there was anything to give it to.
    """

    def __init__(self, removed: Tensor) -> None:
        """Take what is removed.

        Args:
            removed: bool ``(experts,)``, or ``(tokens, experts)`` where tokens differ.
        """
        super().__init__()
        self.removed = removed
        self.experts = removed.shape[-1]
        self.seen = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Change the logits, and what ``topk`` is given."""
        kwargs = {} if kwargs is None else kwargs
        if func in _CHOICES and args and self._runs_over_experts(args[0]):
            return func(self._without(args[0]), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if func in _PRODUCTS and result.shape[-1] == self.experts:
            return self._without(result)
        return result

    def _runs_over_experts(self, scores: Tensor) -> bool:
        """Whether each token has one score per expert, in groups or not."""
        return self.experts in (scores.shape[-1], math.prod(scores.shape[1:]))

    def _without(self, scores: Tensor) -> Tensor:
        self.seen = True
        removed = self.removed
        if scores.shape[-1] != self.experts:  # in groups
            removed = removed.view(*removed.shape[:-1], *scores.shape[1:])
        elif removed.dim() > 1:
            removed = removed.view(scores.shape)
        return scores.masked_fill(removed, -math.inf)

    def check(self, router: str) -> None:
        """Check that the router could be restricted.

        Raises:
            UnsupportedModelError: It chose in some other way.
        """
        if not self.seen:
            raise UnsupportedModelError(
                f"{router} chooses its experts in a way that is not known, so that it cannot be "
                "kept to some of them. Use pathways that keep all experts of this model."
            )

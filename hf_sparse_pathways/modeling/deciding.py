"""The part of a model with pathways that decides on prompts' domains; see ``routing``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.modeling.partial import Partial
from hf_sparse_pathways.modeling.picked import without_prompts
from hf_sparse_pathways.modeling.routing import Decision, Router, asks_router, route_call
from hf_sparse_pathways.pathways.names import AUTO
from hf_sparse_pathways.pathways.pathway import Pathways

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class Deciding(_Base):
    """The part of ``SparsePathwaysModel`` that is about ``domain="auto"``."""

    pathways: Any
    _partial: Partial | None
    _pathways: Pathways | None
    _asked: Any
    _resolve: Any
    _router: tuple[Pathways, Router] | None = None

    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str | None]:
        """Return the domain that each prompt is of; None where it is of none, or hard to say.

        Args:
            input_ids: int64 ``(rows, tokens)``, padded on either side.
            attention_mask: Which of them are no padding.

        Raises:
            PathwaysError: The pathways do not know their domains' text.
        """
        return [found.domain for found in self.decide(input_ids, attention_mask)]

    def decide(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Decision]:
        """Return what ``route`` does with the evidence for it; see ``modeling.routing``."""
        return self._router_for(AUTO).decide(input_ids, attention_mask)

    @property
    def has_router(self) -> bool:
        """Whether ``"auto"`` may stand for a domain."""
        return self._pathways is not None and bool(self._pathways.routed)

    @property
    def text_router(self) -> Router:
        """What knows the domains' text: the router of the pathways in use. It may know none."""
        pathways = self.pathways
        if self._router is None or self._router[0] is not pathways:
            self._router = pathways, Router.of(pathways)
        return self._router[1]

    def _router_for(self, domain: Any) -> Router:
        """Return the router, for a call that names ``domain``."""
        if self._partial is not None:
            self._partial.check(domain)
        router = self.text_router
        router.check()
        if not isinstance(domain, str):
            self._resolve([None if name == AUTO else name for name in without_prompts(domain)])
        return router

    def _route_call(
        self, domain: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, whole: bool = False
    ) -> list[str | None] | None:
        """Return what a call computes per row, if it asks for that to be decided; else None.

        ``whole`` is as in ``route_call``.
        """
        domain = self._asked(domain)
        if not asks_router(domain):
            return None
        router = self._router_for(domain)
        compiling = torch.compiler.is_compiling()
        return route_call(router, domain, args, kwargs, whole=whole, compiling=compiling)

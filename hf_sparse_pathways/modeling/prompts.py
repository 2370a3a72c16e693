"""The part of a model with pathways that picks neurons from prompts; see ``prompting``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.errors import MismatchError, UnsupportedModelError
from hf_sparse_pathways.ffn.attachment import Attachment
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.choices import Choice, find_choice
from hf_sparse_pathways.ffn.picking import Picking
from hf_sparse_pathways.ffn.prompt_rules import Picker
from hf_sparse_pathways.modeling.domains import Unset
from hf_sparse_pathways.modeling.partial import Partial
from hf_sparse_pathways.modeling.prompt_settings import PromptSettings
from hf_sparse_pathways.modeling.prompting import (
    Picked,
    asks_prompt,
    find_prior,
    find_span,
    name_rows,
    read_prompts,
    sort_prompts,
)
from hf_sparse_pathways.pathways.pathway import PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class PromptPathways(_Base):
    """The part of ``SparsePathwaysModel`` that is about ``domain="prompt"``."""

    config: Any
    pathways: Any
    check_no_adapters: Any
    _attachment: Attachment
    _partial: Partial | None
    _resolve: Any
    _fit: Any
    _holding: Any
    _look_at_weights: Any

    @property
    def prompt_settings(self) -> PromptSettings:
        """How ``domain="prompt"`` picks neurons."""
        return PromptSettings.from_dict(self.config.prompt_pathways)

    def set_prompt_pathways(self, **settings: Any) -> None:
        """Say how ``domain="prompt"`` picks neurons from now on, in place; it is saved.

        Args:
            settings: ``sparsity``, the fraction of each block's neurons that is left out after a
                prompt, and ``rule``, how the others are picked; what is not named becomes the
                default. See ``PromptSettings``.

        Raises:
            PathwaysError: One is unknown, or out of range.
        """
        self.config.prompt_pathways = PromptSettings.from_dict(settings).to_dict()

    def _pick_from(
        self, domain: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Picked | None:
        """Return what a call picks neurons with, if it asks for that; else None."""
        if isinstance(domain, Unset):
            ambient = find_choice(self._attachment.key)
            domain = self.config.default_domain if ambient is None else ambient.asked
        if not asks_prompt(domain):
            return None
        counted = read_prompts(args, kwargs, compiling=torch.compiler.is_compiling())
        names = name_rows(domain, len(counted))
        self._check_pickable(names)
        own = [-1 if asks_prompt(name) else int(self._resolve([name])[0]) for name in names]
        settings, blocks = self.prompt_settings, self._attachment.blocks
        picker = Picker(
            rule=settings.rule,
            sparsity=settings.sparsity,
            blocks=[attached.block for attached in blocks],
            priors=[self._prior(find_prior(name)) for name in names],
        )
        picking = Picking(sort_prompts(names, own, counted), picker, blocks)
        return Picked(picking=picking, names=names, provenance=settings.to_dict())

    def _prior(self, domain: str | None) -> tuple[BlockPathway, ...] | None:
        """Return what a domain's pathway keeps of each block."""
        if domain is None:
            return None
        instead = f"Name another domain, or {PROMPT!r} without one."
        blocks: tuple[BlockPathway, ...] = self.pathways[domain].unclustered(domain, instead)
        return blocks

    def _check_pickable(self, domain: Any) -> None:
        """Check that neurons can be picked from prompts, and that every name is known.

        Raises:
            UnknownNameError: One is not.
            PathwaysError: One domain's neurons were loaded alone.
            UnsupportedModelError: Adapters follow the domains, or the weights are sharded.
        """
        names = [domain] if isinstance(domain, str) else domain
        if self._partial is not None:
            self._partial.check(domain)
        for name in names:
            if asks_prompt(name):
                self._prior(find_prior(name))
            else:
                self._resolve([name])
        self.check_no_adapters(f"{PROMPT!r} is no domain that they could follow")
        self._attachment.settle()
        if any(attached.state.shard is not None for attached in self._attachment.blocks):
            raise UnsupportedModelError(
                "The weights are sharded over several processes, and no process sees all neurons "
                f"of a prompt. Load the model without tp_plan for domain={PROMPT!r}."
            )

    @contextmanager
    def _picking(self, picked: Picked) -> Iterator[None]:
        """Let all passes on this thread within the block be of a call that picks neurons."""
        self._look_at_weights()
        with self._holding(None, expand=True) as choice:
            choice.call, choice.routed = picked.picking, picked
            yield

    def _note_mask(self, mask: Any) -> None:
        """Let a call that picks neurons know which tokens of its prompts are padding."""
        ambient = find_choice(self._attachment.key)
        if ambient is not None and ambient.call is not None and isinstance(mask, Tensor):
            ambient.routed.count(mask)

    def _call_within(self, domain: Any) -> Picking | None:
        """Return what picks for the call that a pass is part of, if it names nothing itself."""
        ambient = find_choice(self._attachment.key) if isinstance(domain, Unset) else None
        return None if ambient is None else ambient.call

    def _rows_of(self, picked: Picked) -> Tensor:
        """Return which of the picked pathways computes each row.

        Raises:
            MismatchError: They were picked for another model.
            PathwaysError: The call that was to pick them has not finished.
        """
        if not picked.picking.belongs_to(self._attachment.blocks):
            raise MismatchError(
                "These neurons were picked for another model, or before it was copied. Pick them "
                "from the prompt with this one."
            )
        picked.check_complete()
        return picked.picking.rows(torch.device("cpu"))

    def _begin_call(
        self, call: Picking, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Choice:
        """Begin a pass of a call that picks from its prompts: of these, or of what follows."""
        rows, start, tokens = find_span(args, kwargs)
        name, ambient = self.config.executor, find_choice(self._attachment.key)
        looked = ambient is not None and ambient.call is call
        if call.complete and start >= call.prompts.length:
            chosen = self._fit(call.rows(torch.device("cpu")), rows, expand=True)
            picked = None if chosen is None else call
            return self._attachment.begin(chosen, name, looked=looked, picked=picked)
        call.begin_pass(start, tokens)
        chosen = self._fit(torch.tensor(call.prompts.rows), rows, expand=True)
        return self._attachment.begin(chosen, name, looked=looked, sees=call)

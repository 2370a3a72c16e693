"""The part of a model with pathways that picks neurons from its prompts; see ``picked``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.errors import (
    MismatchError,
    PathwaysError,
    UnknownNameError,
    UnsupportedModelError,
)
from hf_sparse_pathways.ffn.attachment import Attachment
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.choices import Choice, find_choice
from hf_sparse_pathways.ffn.picking import Picking
from hf_sparse_pathways.ffn.prompt_rules import WITH_PRIOR, Picker
from hf_sparse_pathways.modeling.domains import Unset
from hf_sparse_pathways.modeling.partial import Partial
from hf_sparse_pathways.modeling.picked import (
    Picked,
    asks_prompt,
    find_prior,
    find_span,
    name_rows,
    read_prompts,
    refuse_compiled,
    sort_prompts,
)
from hf_sparse_pathways.modeling.prompt_settings import PromptSettings
from hf_sparse_pathways.pathways.names import PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class Prompting(_Base):
    """The part of ``SparsePathwaysModel`` that is about ``domain="prompt"``."""

    config: Any
    pathways: Any
    adapters: Any
    check_no_adapters: Any
    _attachment: Attachment
    _partial: Partial | None
    _asked: Any
    _resolve: Any
    _fit: Any
    _holding: Any
    _look_at_weights: Any

    @property
    def picks_neurons(self) -> bool:
        """Whether ``"prompt"`` may stand for a domain.

        It may not where one domain's neurons were loaded alone, domains have adapters, or there
        are no FFN blocks.
        """
        return self._partial is None and not self.adapters and bool(self._attachment.blocks)

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
            UnsupportedModelError: The model has no FFN blocks.
        """
        self.check_has_blocks()
        self.config.prompt_pathways = PromptSettings.from_dict(settings).to_dict()

    def _pick_from(
        self, domain: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Picked | None:
        """Return what a call picks neurons with, if it asks for that; else None."""
        domain = self._asked(domain)
        if not asks_prompt(domain):
            return None
        refuse_compiled(torch.compiler.is_compiling())
        return self._start(domain, read_prompts(args, kwargs))

    def _start(self, domain: Any, counted: Tensor, ends: Tensor | None = None) -> Picked:
        """Return what is to pick the neurons of some rows; see ``sort_prompts``."""
        names = name_rows(domain, len(counted))
        self._check_pickable(names)
        own = [-1 if asks_prompt(name) else int(self._resolve([name])[0]) for name in names]
        settings, blocks = self.prompt_settings, self._attachment.blocks
        picker = Picker(
            rule=settings.rule,
            sparsity=settings.sparsity,
            blocks=blocks,
            priors=[self._prior(find_prior(name)) for name in names],
        )
        picking = Picking(sort_prompts(names, own, counted, ends), picker, blocks)
        method = {"method": f"prompt, {settings.rule}"}
        return Picked(picking=picking, names=names, provenance=method)

    @contextmanager
    def prompted(self, domain: Any, mask: Tensor, lengths: Sequence[int]) -> Iterator[Picked]:
        """Within the block, a pass over whole texts takes the beginning of each as its prompt.

        That gives at once, for measurements, what a generation gives token by token: the
        beginnings are computed densely, and the rest with what was picked from them.

        Args:
            domain: ``"prompt"``, or a list with a domain per row.
            mask: Which tokens are text, ``(rows, tokens)``; padding is on the right.
            lengths: For each row how many tokens its prompt has.

        Raises:
            PathwaysError: Neurons cannot be picked; see ``generate``.
        """
        ends = torch.tensor(lengths)
        counted = mask.cpu()[:, : int(ends.max())] > 0
        counted &= torch.arange(counted.shape[1]) < ends[:, None]
        picked = self._start(domain, counted, ends)
        with self._picking(picked):
            yield picked

    def _prior(self, domain: str | None) -> tuple[BlockPathway, ...] | None:
        """Return what a domain's pathway keeps of each block."""
        if domain is None:
            return None
        instead = f"As a prior name another domain, or {PROMPT!r} without one."
        if domain not in self.pathways.by_domain:
            raise UnknownNameError("domain", domain, self.pathways.domains)
        if self.prompt_settings.rule not in WITH_PRIOR:
            raise PathwaysError(
                f"The rule {self.prompt_settings.rule!r} of prompt pathways takes no domain as a "
                f"prior. Call model.set_prompt_pathways(rule={WITH_PRIOR[0]!r}), or name "
                f"{PROMPT!r} alone."
            )
        blocks: tuple[BlockPathway, ...] = self.pathways[domain].unclustered(domain, instead)
        if any(block.bypass is not None or block.incoming for block in blocks):
            raise UnsupportedModelError(
                f"The pathway of {domain!r} has a bypass, or changed rows, of which the prompt's "
                f"dense activations do not say what they do. {instead}"
            )
        return blocks

    def check_has_blocks(self) -> None:
        """Check that there are FFN blocks, of whose neurons a prompt could choose.

        Raises:
            UnsupportedModelError: There are none.
        """
        self._attachment.settle()
        if not self._attachment.blocks:
            ffn = self.config.ffn
            what = "routed experts" if ffn is None else f"{ffn.kind} layers"
            raise UnsupportedModelError(
                f"domain={PROMPT!r} picks neurons of FFN blocks, and this model has none: its FFNs "
                f"are {what}. {'Name a domain' if self.domains else 'Leave it out'}."
            )

    def _check_pickable(self, domain: Any) -> None:
        """Check that neurons can be picked from prompts, and that every name is known.

        Raises:
            UnknownNameError: One is not.
            PathwaysError: One domain's neurons were loaded alone.
            UnsupportedModelError: Adapters follow the domains, or the weights are sharded, or
                there are no FFN blocks.
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
        self.check_has_blocks()
        if any(attached.state.shard is not None for attached in self._attachment.blocks):
            raise UnsupportedModelError(
                "The weights are sharded over several processes, and no process sees all neurons "
                f"of a prompt. Load the model without tp_plan for domain={PROMPT!r}."
            )

    @contextmanager
    def _picking(self, picked: Picked) -> Iterator[Choice]:
        """Let all passes on this thread within the block be of a call that picks neurons."""
        refuse_compiled(self._is_compiled)
        self._look_at_weights()
        with self._holding(None, expand=True) as choice:
            choice.call, choice.routed = picked.picking, picked
            yield choice

    def _note_mask(self, mask: Any) -> None:
        """Let a call that picks neurons know which tokens of its prompts are padding."""
        ambient = find_choice(self._attachment.key)
        if ambient is None or ambient.call is None or not isinstance(mask, Tensor):
            return
        if not ambient.call.complete:
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
        picked.picking.check_complete()
        return picked.picking.rows(torch.device("cpu"))

    def _begin_call(self, call: Picking, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Choice:
        """Begin a pass of a call that picks from its prompts: of these, or of what follows."""
        refuse_compiled(torch.compiler.is_compiling())
        rows, start, tokens = find_span(args, kwargs)
        name, ambient = self.config.executor, find_choice(self._attachment.key)
        looked = ambient is not None and ambient.call is call
        if start >= call.prompts.length:
            call.check_complete()
            chosen = self._fit(call.rows(torch.device("cpu")), rows, expand=True)
            picked = None if chosen is None else call
            return self._attachment.begin(chosen, name, looked=looked, picked=picked)
        call.begin_pass(start, tokens)
        chosen = self._fit(torch.tensor(call.prompts.rows), rows, expand=True)
        return self._attachment.begin(chosen, name, looked=looked, sees=call)

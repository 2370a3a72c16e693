"""``domain="prompt"``: neurons that the prompt of a call has used, for the text that continues it.

The prompt passes densely; what was picked from it computes everything after it (``ffn/picking.py``
sees, ``ffn/prompt_rules.py`` picks). Each row has its own neurons, once per generation, and may
stand beside rows of other domains. A prompt of too few tokens shows too little: its row is dense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.picking import Picking, Prompts
from hf_sparse_pathways.modeling.routing import tell_domains
from hf_sparse_pathways.pathways.names import PROMPT
from hf_sparse_pathways.pathways.pathway import Pathway

LEAST_TOKENS = 8
"""Of a prompt; of fewer nothing is picked, and its row is computed densely."""

PRIOR = f"{PROMPT}:"
"""Before the name of a domain that says what to expect of a prompt."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Picked:
    """What was picked from the prompts of one call; ``domain=`` takes it, to go on with it.

    Attributes:
        picking: What has picked it.
        names: What the call named for each row.
        provenance: How it was picked; plain JSON values.
    """

    picking: Picking
    names: Sequence[str | None]
    provenance: Mapping[str, Any]

    @property
    def domains(self) -> list[str | None]:
        """What computes each row after its prompt; None, too, where a prompt was too short."""
        picking = self.picking.prompts.picking
        return [
            None if asks_prompt(name) and row not in picking else name
            for row, name in enumerate(self.names)
        ]

    @cached_property
    def pathways(self) -> tuple[Pathway | None, ...]:
        """What was picked for each row, None where nothing was."""
        prompts = self.picking.prompts
        found: list[Pathway | None] = [None] * len(prompts.rows)
        self.picking.check_complete()
        blocks = [self.picking.block(index) for index in range(self.picking.blocks)]
        for number, row in enumerate(prompts.picking):
            own = tuple(block[number] for block in blocks)
            removed = sum(len(block.keep) - block.kept for block in own)
            provenance = {
                **self.provenance,
                "sparsity": removed / sum(len(block.keep) for block in own),
                "tokens": int(prompts.counted[row].sum()),
            }
            prior = find_prior(self.names[row])
            if prior is not None:
                provenance["prior"] = prior
            found[row] = Pathway(blocks=own, provenance=provenance)
        return tuple(found)

    def count(self, mask: Tensor) -> None:
        """Take note of which tokens are no padding, before the first of them passes, in place."""
        own = self.picking.prompts.rows
        self.picking.prompts = sort_prompts(self.names, own, mask.cpu() > 0)

    def __repr__(self) -> str:
        return f"Picked({', '.join(name or 'dense' for name in self.domains)})"


def asks_prompt(domain: Any) -> bool:
    """Whether neurons are to be picked from the prompt, for all rows or for some."""
    if isinstance(domain, str):
        return domain == PROMPT or domain.startswith(PRIOR)
    return isinstance(domain, list | tuple) and any(map(asks_prompt, domain))


def without_prompts(domain: Any) -> list[Any]:
    """Return a list of domains with None where neurons are picked from the prompt."""
    return [None if asks_prompt(name) else name for name in domain]


def name_rows(domain: Any, rows: int) -> list[str | None]:
    """Return what a call names for each row.

    Raises:
        PathwaysError: It names something for another number of rows.
    """
    named = [domain] * rows if isinstance(domain, str) else list(domain)
    if len(named) != rows:
        raise PathwaysError(
            f"domain has {len(named)} entries, but the batch has {rows} rows. Give one entry per "
            "row, or a single name for all."
        )
    return named


def find_prior(name: str | None) -> str | None:
    """Return the domain that what a call names for a row has as its prior."""
    return None if name is None or not name.startswith(PRIOR) else name.removeprefix(PRIOR)


def find_span(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return a call's rows, how many tokens of each are in its cache, and how many come."""
    named = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")]
    given = next((value for value in (*named, *args[:1]) if isinstance(value, Tensor)), None)
    rows, tokens = (1, 1) if given is None else given.shape[:2]  # generate starts from BOS
    caches = (kwargs.get(name) for name in ("cache", "past_key_values"))
    cache = next((given for given in caches if hasattr(given, "get_seq_length")), None)
    start = 0 if cache is None else int(cache.get_seq_length())
    return int(rows), start, int(tokens)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def refuse_compiled(compiling: Any) -> None:
    """Check that no graph is being traced, in which nothing may depend on activations.

    Raises:
        PathwaysError: One is.
    """
    if compiling:
        raise PathwaysError(
            f"domain={PROMPT!r} cannot be decided within a compiled pass: what is computed depends "
            "on the prompt. Name a domain, or compile neither the model nor, with "
            "disable_compile=True, its generation."
        )


def read_prompts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return which tokens of a call's prompts are text and no padding, bool ``(rows, tokens)``.

    Args:
        args: The call's.
        kwargs: The call's.

    Raises:
        PathwaysError: The beginning of the text is in a cache, or the mask has another shape.
    """
    rows, start, tokens = find_span(args, kwargs)
    if start:
        raise PathwaysError(
            f"domain={PROMPT!r} picks neurons once, from a whole prompt, and this call continues a "
            "text whose beginning is in the cache. Keep what the first call picked (`picked` of "
            "its output, with return_dict_in_generate=True), and pass domain=picked."
        )
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.ones(rows, tokens, dtype=torch.bool)
    if mask.shape != (rows, tokens):
        raise PathwaysError(
            f"attention_mask has the shape {tuple(mask.shape)}, and the prompts {(rows, tokens)}: "
            f"domain={PROMPT!r} needs a mask of the same shape, or none."
        )
    return mask.cpu() > 0


def check_forms(settings: Mapping[str, Any]) -> None:
    """Check that a generation draws its tokens in a way in which neurons can be picked.

    Raises:
        PathwaysError: Passes of a part of the model come before the prompt's.
    """
    config = settings.get("generation_config")
    if settings.get("assistant_early_exit") or getattr(config, "assistant_early_exit", None):
        raise PathwaysError(
            f"assistant_early_exit runs a part of the layers before the prompt has passed all of "
            f"them, so that domain={PROMPT!r} has nothing to pick from. Name a domain, or leave "
            "assistant_early_exit out."
        )


def sort_prompts(
    names: Sequence[str | None], own: Sequence[int], counted: Tensor, ends: Tensor | None = None
) -> Prompts:
    """Return the rows of a call whose prompts have tokens enough to pick from.

    Args:
        names: What the call names for each row.
        own: For each row the pathway that computes it, -1 for dense.
        counted: As in ``Prompts``.
        ends: The same; without, all prompts are as long as ``counted``.
    """
    if ends is None:
        ends = torch.full((len(counted),), counted.shape[1])
    lengths = counted.sum(1).tolist()
    picking = [
        row for row, name in enumerate(names) if asks_prompt(name) and lengths[row] >= LEAST_TOKENS
    ]
    return Prompts(rows=list(own), picking=picking, counted=counted, ends=ends)


def tell_decisions(output: Any, decided: Any) -> Any:
    """Return an output which, if it is more than tensors, says what was decided for its rows.

    As ``domains``, and what was picked from prompts as ``picked``.
    """
    if not isinstance(decided, Picked):
        return tell_domains(output, decided)
    if isinstance(output, ModelOutput):
        output.domains, output.picked = decided.domains, decided
    return output

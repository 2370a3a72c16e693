"""Which domain a prompt is of, or none: the decision behind ``domain="auto"``.

A prompt goes to the one domain that all kinds of evidence (``kinds.py``) say it may be of.
Otherwise it goes nowhere, and the dense model answers: a wrong pathway is far worse than none.
Unknown domains need not be known for that.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.modeling.kinds import KINDS, check_kinds, nearest
from hf_sparse_pathways.pathways.framing import Framing
from hf_sparse_pathways.pathways.names import AUTO
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.pathways.signature import LENGTHS, Signature

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Where one prompt goes.

    Attributes:
        domain: The domain; None for the dense model.
        tokens: How many of the prompt's tokens say something.
        scores: Domain -> mean evidence per token, in nats beside the model's own text.
        seen: Domain -> fraction of the prompt's pairs of tokens that the domain's text holds.
        typicality: Fraction of the nearest domain's held-out text that scores less, in [0, 1];
            None where there are too few tokens to say.
    """

    domain: str | None
    tokens: int
    scores: Mapping[str, float]
    seen: Mapping[str, float]
    typicality: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Router:
    """Decides between domains by their signatures.

    Attributes:
        signatures: Domain -> what tells its text; domains without one are never chosen.
        kinds: What has to agree, of ``KINDS``.

    Raises:
        UnknownNameError: There is no such kind.
    """

    signatures: Mapping[str, Signature]
    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        """Check the kinds."""
        check_kinds(self.kinds)

    @classmethod
    def of(cls, pathways: Pathways) -> "Router":
        """Return the router of some pathways, with all kinds."""
        signatures = {
            name: pathway.signature
            for name, pathway in pathways.by_domain.items()
            if pathway.signature is not None
        }
        return cls(signatures=signatures)

    def check(self) -> None:
        """Check that there is a domain to choose.

        Raises:
            PathwaysError: There is none.
        """
        if not self.signatures:
            raise PathwaysError(
                f"domain={AUTO!r} needs to know the domains' text, and these pathways do not: they "
                "were made from masks, or by an earlier version. Build them anew with "
                "`sparse-pathways build` (or sp.profile and sp.select), or name the domain."
            )

    @cached_property
    def table(self) -> Tensor:
        """What tokens say of each domain, in nats, float32 ``(vocabulary + 1, domains)``.

        Special tokens say nothing; the last row is of those that are not in the vocabulary.
        """
        size = max((len(one.tokens) for one in self.signatures.values()), default=0)
        table = torch.zeros(size + 1, len(self.signatures))
        for column, signature in enumerate(self.signatures.values()):
            weights = signature.tokens.float()
            weights[signature.ignored[signature.ignored < len(weights)].long()] = 0.0
            table[: len(weights), column] = weights
        return table

    @cached_property
    def _framings(self) -> frozenset[Framing]:
        """The signatures' framings, usually one."""
        return frozenset(signature.framing for signature in self.signatures.values())

    def decide(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Decision]:
        """Decide for each row.

        Args:
            input_ids: int64 ``(rows, tokens)``, padded on either side.
            attention_mask: Which of them are no padding, of the same shape; without it all are
                taken, and what is special says nothing anyhow.

        Raises:
            PathwaysError: There is no router, these are no prompts, or this is no mask of them.
        """
        self.check()
        ids = check_prompts(input_ids).cpu()
        if attention_mask is None:
            rows = list(ids)
        else:
            shape = getattr(attention_mask, "shape", None)
            if not isinstance(attention_mask, Tensor) or shape != ids.shape:
                given = type(attention_mask).__name__ if shape is None else tuple(shape)
                raise PathwaysError(
                    f"attention_mask is {given}, and input_ids have the shape {tuple(ids.shape)}: "
                    f"domain={AUTO!r} needs a tensor of the same shape, or none."
                )
            kept = attention_mask.cpu() > 0
            rows = [row[mask] for row, mask in zip(ids, kept, strict=True)]
        decisions = [self._decide(row) for row in rows]
        if logger.isEnabledFor(logging.INFO):
            logger.info("Routed %s.", _describe(decisions))
        return decisions

    def _decide(self, ids: Tensor) -> Decision:
        texts = {framing: framing.take(ids) for framing in self._framings}
        readings = {name: one.read(texts[one.framing]) for name, one in self.signatures.items()}
        best = nearest(readings)
        said = readings[best]
        enough = said.count >= LENGTHS[0]
        admitted = set(readings) if enough else set()
        for kind in self.kinds:
            admitted &= KINDS[kind](self.signatures, readings)
        return Decision(
            domain=admitted.pop() if len(admitted) == 1 else None,
            tokens=said.count,
            scores={name: reading.score for name, reading in readings.items()},
            seen={name: reading.seen for name, reading in readings.items()},
            typicality=self.signatures[best].typicality(said) if enough else None,
        )


def asks_router(domain: Any) -> bool:
    """Whether ``"auto"`` stands for a domain, for all rows or for some."""
    if isinstance(domain, str):
        return domain == AUTO
    return isinstance(domain, list | tuple) and AUTO in domain


@torch.compiler.disable  # type: ignore[untyped-decorator]
def route_call(
    router: Router,
    domain: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    whole: bool,
    compiling: bool,
) -> list[str | None]:
    """Return one name per row of a call, with what is decided in place of ``"auto"``.

    Args:
        router: Decides.
        domain: As the call names it, with ``"auto"`` in it.
        args: The call's.
        kwargs: The call's.
        whole: Whether the call's token ids are all of the text, what is in a cache included.
        compiling: Whether a graph is being traced, in which nothing may depend on token ids.

    Raises:
        PathwaysError: The call has no prompts, or another number of them, or is compiled.
    """
    if compiling:
        raise PathwaysError(
            f"domain={AUTO!r} cannot be decided within a compiled pass. Decide before it: "
            "domain=model.route(input_ids, attention_mask)."
        )
    ids, mask = find_prompts(args, kwargs, whole=whole)
    named = [AUTO] * len(ids) if isinstance(domain, str) else list(domain)
    if len(named) != len(ids):
        raise PathwaysError(
            f"domain has {len(named)} entries, but the batch has {len(ids)} rows. Give one entry "
            "per row, or a single name for all."
        )
    found = [decision.domain for decision in router.decide(ids, mask)]
    pairs = zip(named, found, strict=True)
    return [other if name == AUTO else name for name, other in pairs]


def agreed(names: Sequence[str | None]) -> Any:
    """Return the one name of all rows, or the list."""
    return names[0] if len({*names}) == 1 else list(names)


def tell_domains(output: Any, routed: list[str | None] | None) -> Any:
    """Return an output which, if it is more than tensors, has the decisions as ``domains``."""
    if routed is not None and isinstance(output, ModelOutput):
        output.domains = routed
    return output


def find_prompts(
    args: Sequence[Any], kwargs: Mapping[str, Any], *, whole: bool
) -> tuple[Tensor, Tensor | None]:
    """Return a call's token ids and its attention mask.

    Args:
        args: The call's.
        kwargs: The call's.
        whole: As in ``route_call``.

    Raises:
        PathwaysError: There are no token ids, or they continue a text whose beginning is in a
            cache: a choice is made once, from the prompt.
    """
    ids = find_ids(args, kwargs)
    if ids is None:
        raise PathwaysError(
            f"domain={AUTO!r} reads the prompt's tokens, and this call has none (inputs_embeds are "
            "no tokens). Pass input_ids, or name the domain: model.route(input_ids) decides apart."
        )
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    known = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if known >= (ids.shape[-1] if whole else 1):
        raise PathwaysError(
            f"domain={AUTO!r} is decided once, from the prompt, and this call continues a text "
            "whose beginning is in the cache. Keep what model.route(input_ids) says of the prompt, "
            "and name that domain."
        )
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    check_prompts(ids)
    return ids, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def find_ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return a call's token ids, if it has any."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs"))
    return next((value for value in (*args[:1], *named) if isinstance(value, Tensor)), None)


def check_prompts(input_ids: Any) -> Tensor:
    """Return token ids as they are.

    Raises:
        PathwaysError: They are no ``(rows, tokens)`` of whole numbers.
    """
    fits = isinstance(input_ids, Tensor) and input_ids.dim() == 2
    if not fits or input_ids.is_floating_point():
        told = type(input_ids).__name__
        if isinstance(input_ids, Tensor):
            told = f"{input_ids.dtype} {tuple(input_ids.shape)}"
        raise PathwaysError(
            f"Token ids have to be a tensor (rows, tokens) of whole numbers, got {told}."
        )
    checked: Tensor = input_ids
    return checked


def _describe(decisions: Sequence[Decision]) -> str:
    counts = Counter(decision.domain or "dense" for decision in decisions)
    return ", ".join(f"{count} to {name}" for name, count in counts.items())

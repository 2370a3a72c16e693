"""A check while generating: a row whose text leaves its domain goes on without its pathway.

Every new token adds its weight (``pathways/signature.py``) less what a domain's token needs to give
to the evidence of each domain, which stays between none and full: a clipped CUSUM. A row leaves its
domain when there is no evidence left, and goes to one when its evidence is full and no other domain
has any. That depends on the row's new tokens alone, so beams may be reordered, and drafts dropped.

Source: E. Page 1954, "Continuous inspection schemes", Biometrika 41; clipped on both sides here.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.modeling.routing import Router, find_ids
from hf_sparse_pathways.pathways.names import AUTO

NEEDED = 0.3
"""Nats that a token has to give on average so that evidence does not shrink."""

FULL = 12.0
"""Most evidence, in nats: foreign text takes it within about fifty tokens."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A row's domain from some token on.

    Attributes:
        token: The first new token that it predicts, counted from 0.
        domain: The domain; None for the dense model.
    """

    token: int
    domain: str | None


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What one row of a call may compute.

    Attributes:
        domain: What it begins with; None for the dense model.
        choices: The domains that it may go to, its own among them; none for a row that was asked
            to be dense.
    """

    domain: str | None
    choices: frozenset[str]


@dataclass(frozen=True)
class _State:
    """Where a row's text stands: each domain's evidence in nats, and what is computed."""

    evidence: tuple[float, ...]
    domain: str | None


class Guard:
    """Watches the rows of one generation.

    Args:
        router: Knows the domains' text.
        rows: What the call's rows may compute.
        prompt: Tokens before the new ones.

    Attributes:
        rows: As given.
    """

    def __init__(self, router: Router, rows: Sequence[Watched], prompt: int) -> None:
        self._names = list(router.signatures)
        self._table = router.table
        self.rows = rows
        self._prompt = prompt
        self._seen = torch.empty(0, 0, dtype=torch.int64)
        self._states: list[_State] = []

    def follow(self, input_ids: Tensor) -> list[str | None]:
        """Return what is computed after some text.

        Args:
            input_ids: int64 ``(rows, tokens)``, each of the call's rows once or several times in
                sequence, with the prompt.
        """
        new = input_ids[:, self._prompt :].to("cpu", copy=True)
        seen = self._seen.shape[1]
        states = self._states
        if len(new) != len(self._seen) or not torch.equal(new[:, :seen], self._seen):
            states = self._recall(new)
        said = self._weigh(new[:, seen:])
        self._states = [
            self._advance(state, steps, self._watched(row, len(new)))
            for row, (state, steps) in enumerate(zip(states, said, strict=True))
        ]
        self._seen = new
        return [state.domain for state in self._states]

    def history(self, sequences: Tensor) -> list[list[Switch]]:
        """Return the switches of each row of what was generated, ``(rows, tokens)``."""
        new = sequences[:, self._prompt :].cpu()
        found = []
        for row, steps in enumerate(self._weigh(new[:, :-1])):
            watched = self._watched(row, len(new))
            state, switches = self._begin(watched), []
            for token, said in enumerate(steps, start=1):
                after = self._advance(state, [said], watched)
                if after.domain != state.domain:
                    switches.append(Switch(token=token, domain=after.domain))
                state = after
            found.append(switches)
        return found

    def tell(self, output: Any) -> list[str | None]:
        """Give an output that is more than tensors its ``switches``; return the first domains."""
        whole = isinstance(output, ModelOutput)
        if whole or logger.isEnabledFor(logging.INFO):
            switches = self.history(output.sequences if whole else output)
            logger.info("Guarded %d rows: %s.", len(switches), _describe(switches))
        if whole:
            output.switches = switches
        return [row.domain for row in self.rows]

    def _recall(self, new: Tensor) -> list[_State]:
        """Return the states of rows that were put in another order, or begin with other tokens."""
        seen, count = self._seen.shape[1], len(new)
        known = {
            (self._source(row, len(self._seen)), *ids): self._states[row]
            for row, ids in enumerate(self._seen.tolist())
        }
        states = []
        for row, ids in enumerate(new[:, :seen].tolist()):
            state = known.get((self._source(row, count), *ids))
            if state is None:
                watched = self._watched(row, count)
                said = self._weigh(new[row : row + 1, :seen])[0]
                state = self._advance(self._begin(watched), said, watched)
            states.append(state)
        return states

    def _weigh(self, ids: Tensor) -> list[list[list[float]]]:
        """Return what tokens say of each domain: rows, tokens, domains."""
        last = len(self._table) - 1
        index = ids.where((ids >= 0) & (ids < last), last)
        weights: list[list[list[float]]] = self._table[index].tolist()
        return weights

    def _advance(self, state: _State, said: Sequence[Sequence[float]], row: Watched) -> _State:
        """Return the state after some tokens."""
        evidence, domain = state.evidence, state.domain
        for weights in said:
            evidence = tuple(
                min(FULL, max(0.0, before + weight - NEEDED))
                for before, weight in zip(evidence, weights, strict=True)
            )
            some = [name for name, nats in zip(self._names, evidence, strict=True) if nats > 0.0]
            if domain not in some:
                domain = None
            if len(some) == 1 and some[0] in row.choices and max(evidence) == FULL:
                domain = some[0]
        return _State(evidence, domain)

    def _begin(self, row: Watched) -> _State:
        evidence = tuple(FULL if name == row.domain else 0.0 for name in self._names)
        return _State(evidence, row.domain)

    def _source(self, row: int, count: int) -> int:
        """Return of which of the call's rows one of ``count`` is a copy."""
        return row * len(self.rows) // count

    def _watched(self, row: int, count: int) -> Watched:
        return self.rows[self._source(row, count)]


def watch_rows(router: Router, domains: Sequence[str | None], asked: Any) -> list[Watched]:
    """Return what the rows of a call may compute.

    Args:
        router: Knows the domains' text.
        domains: What they begin with.
        asked: What the call named, for all rows or each: ``"auto"`` may go to any domain.

    Raises:
        PathwaysError: The text of a row's domain is not known.
    """
    named = asked if isinstance(asked, list | tuple) else [asked] * len(domains)
    rows = []
    for domain, name in zip(domains, named, strict=True):
        if domain is not None and domain not in router.signatures:
            raise PathwaysError(
                f"guard=True needs to know the text of {domain!r}, and these pathways do not: they "
                "were made from masks, or by an earlier version. Build them anew with "
                "`sparse-pathways build` (or sp.profile and sp.select), or leave the guard out."
            )
        own = () if domain is None else (domain,)
        choices = router.signatures if name == AUTO else own
        rows.append(Watched(domain=domain, choices=frozenset(choices)))
    return rows


def count_prompt(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return how many token ids of what ``generate`` returns are no new ones."""
    ids = find_ids(args, kwargs)
    if ids is not None:
        return int(ids.shape[1])
    return 0 if kwargs.get("inputs_embeds") is not None else 1  # it begins with a token of its own


def _describe(found: Sequence[Sequence[Switch]]) -> str:
    counts = Counter(switch.domain or "dense" for switches in found for switch in switches)
    told = ", ".join(f"{count} to {name}" for name, count in counts.items())
    return told or "none left its domain"

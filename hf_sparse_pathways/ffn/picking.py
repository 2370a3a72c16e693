"""Neurons that are picked from the prompt of one call, and stand-ins of the leaves for them.

While a prompt passes densely, the outgoing leaf of every block shows its activation. A block that
has seen the whole prompt picks; what comes after is computed with each row's neurons, on stand-ins
of the leaves that share the weights and have pathways and copies of their own. So nothing of a
call is left on the modules: threads do not meet, and a call's copies go when it ends.

A pass may hold tokens of the prompt and later ones, without a cache or with an assistant's
guesses. Later ones are then masked at the outgoing leaf: a token depends on those before it
alone, so that this computes what a cache would.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.copies import copy_bytes
from hf_sparse_pathways.ffn.forms import Form
from hf_sparse_pathways.ffn.mixtures import Mixture
from hf_sparse_pathways.ffn.state import BlockState

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.attached_block import AttachedBlock
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf

Pick = Callable[[int, int, Tensor], BlockPathway]
"""From a block, a row (both by number) and its activations ``(tokens, d_ff)`` to what is kept.

The activations are those of the prompt's tokens, padding left out, in the model's dtype.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """The rows of a call before the first token is computed.

    Attributes:
        rows: For each row the pathway that computes it, -1 for dense.
        picking: The rows among them, -1 there, whose neurons are picked from their prompt.
        counted: Which tokens of each row are text and no padding, bool ``(rows, tokens)``.
        ends: For each row how many tokens its prompt has, padding before it with them.
    """

    rows: Sequence[int]
    picking: Sequence[int]
    counted: Tensor
    ends: Tensor

    @property
    def length(self) -> int:
        """How many tokens the longest prompt has, padding with them."""
        return int(self.counted.shape[1])


class Picking:
    """What one call sees of its prompts, what it picks, and what computes that.

    Attributes:
        prompts: The call's rows; until the first pass they may be replaced.
    """

    def __init__(self, prompts: Prompts, pick: Pick, blocks: Sequence["AttachedBlock"]) -> None:
        """Get ready to see prompts.

        Args:
            prompts: The call's rows.
            pick: What picks.
            blocks: The model's.
        """
        self.prompts = prompts
        self._pick, self._blocks = pick, tuple(blocks)
        self._number = {id(attached.state): index for index, attached in enumerate(blocks)}
        self._seen: dict[int, list[list[Tensor]]] = {}
        self._states: dict[int, BlockState] = {}
        self._leaves: dict[int, Any] = {}
        self._start = self._tokens = 0
        self._copies: dict[int, int | Mixture | None] = {}

    @property
    def blocks(self) -> int:
        """How many blocks pick."""
        return len(self._blocks)

    @property
    def complete(self) -> bool:
        """Whether every block has picked."""
        return len(self._states) == len(self._blocks)

    def check_complete(self) -> None:
        """Check that every block has picked.

        Raises:
            PathwaysError: One has not.
        """
        if not self.complete:
            raise PathwaysError(
                "No neurons have been picked: the prompt from which they are to be has not passed "
                "all FFN blocks. Name a domain if this model passes some by."
            )

    def belongs_to(self, blocks: Sequence["AttachedBlock"]) -> bool:
        """Whether these are the blocks that it has seen."""
        return self._blocks == tuple(blocks)

    def block(self, index: int) -> tuple[BlockPathway, ...]:
        """Return what was picked of a block, for each row in ``Prompts.picking``."""
        state = self._states[id(self._blocks[index].state)]
        return state.members.all[: len(self.prompts.picking)]

    # -- while prompts pass -----------------------------------------------------------------

    def begin_pass(self, start: int, tokens: int) -> None:
        """Take note of which tokens come.

        Args:
            start: How many tokens of each row are in the cache.
            tokens: How many of each row come.
        """
        self._start, self._tokens = start, tokens
        if start == 0 and not self.complete:
            self._seen, self._states, self._leaves = {}, {}, {}

    @property
    def has_later(self) -> bool:
        """Whether it has tokens that come after the prompt."""
        return self._start + self._tokens > self.prompts.length

    def see(self, state: BlockState, activation: Tensor) -> None:
        """Take a block's activation in a pass of the prompt, before it is masked.

        Args:
            state: The block's.
            activation: ``(rows, tokens, d_ff)`` or ``(rows * tokens, d_ff)``.
        """
        if id(state) in self._states:
            return
        stop = min(self._start + self._tokens, self.prompts.length)
        values = self._by_row(activation.detach())
        first = values.shape[1] - self._tokens
        values = values[:, first : first + stop - self._start]
        counted = self.prompts.counted[:, self._start : stop].to(values.device)
        repeat = len(values) // len(self.prompts.rows)
        seen = self._seen.setdefault(id(state), [[] for _ in self.prompts.picking])
        for row, parts in zip(self.prompts.picking, seen, strict=True):
            parts.append(values[row * repeat][counted[row]])  # beams of one prompt are alike
        if stop == self.prompts.length:
            self._settle(state, [torch.cat(parts) for parts in self._seen.pop(id(state))])

    def later(self, activation: Tensor) -> Tensor:
        """Return what computes each token of a pass with later tokens, int64, -1 for dense.

        Args:
            activation: Of the outgoing leaf, of which the result has all dimensions but the last.
        """
        shape = activation.shape[:-1]
        rows = self.rows(activation.device)
        extra = self._by_row(activation).shape[1] - self._tokens
        place = torch.arange(-extra, self._tokens, device=rows.device) + self._start
        repeat = self._by_row(activation).shape[0] // len(rows)
        picked = (rows >= 0) & (rows < len(self.prompts.picking))
        is_prompt = (place < self.prompts.ends.to(rows.device)[:, None]) & picked[:, None]
        members = rows[:, None].expand(-1, len(place)).masked_fill(is_prompt, -1)
        return members.repeat_interleave(repeat, dim=0).reshape(shape)

    def _by_row(self, activation: Tensor) -> Tensor:
        """Return ``(rows, tokens, d_ff)``; a model may have put tokens in front of the text.

        Raises:
            UnsupportedModelError: The model does not give all tokens to the block.
        """
        rows = len(activation) if activation.dim() > 2 else len(activation) // self._tokens
        values = activation.reshape(max(rows, 1), -1, activation.shape[-1])
        if values.shape[1] < self._tokens or rows % len(self.prompts.rows):
            raise UnsupportedModelError(
                f"An FFN block received an activation of shape {tuple(activation.shape)} for "
                f"{self._tokens} tokens a row: the model routes tokens past it, so that it is not "
                "known whose they are. Neurons cannot be picked from a prompt there; name a domain."
            )
        return values

    # -- what was picked --------------------------------------------------------------------

    def rows(self, device: torch.device) -> Tensor:
        """Return for each row which of a stand-in's pathways computes it, int64, -1 for dense.

        Those of prompts come first, then the model's own.
        """
        count = len(self.prompts.picking)
        rows = [own + count if own >= 0 else -1 for own in self.prompts.rows]
        for number, row in enumerate(self.prompts.picking):
            rows[row] = number
        return torch.tensor(rows, device=device)

    def own(self, pathway: int | Tensor) -> int | Tensor:
        """Return the model's own pathway of what ``rows`` numbers, -1 for what was picked."""
        count = len(self.prompts.picking)
        if isinstance(pathway, int):
            return max(pathway - count, -1)
        return (pathway - count).clamp_min(-1)

    def state(self, state: BlockState) -> BlockState:
        """Return what stands in for a block's state."""
        return self._states[id(state)]

    def leaf(self, leaf: "PathwayLeaf") -> Any:
        """Return what stands in for a leaf."""
        return self._leaves[id(leaf)]

    def copies_of(self, pathway: int | Tensor) -> int | Mixture | None:
        """Return what the copies compute of a pass's rows; None if these have to be masked."""
        repeat = 0 if isinstance(pathway, int) else len(pathway) // len(self.prompts.rows)
        if repeat not in self._copies:
            copies = pathway if isinstance(pathway, int) else Mixture.of(pathway)
            used = (copies,) if isinstance(copies, int) else copies.key
            states = self._states.values()
            by_token = {index for own in states for index in own.members.by_token}
            self._copies[repeat] = copies if by_token.isdisjoint(used) else None
        return self._copies[repeat]

    def size(self, form: Form) -> int:
        """Return how many bytes the copies take."""
        found = sorted({*self.rows(torch.device("cpu")).tolist()})
        key = found[0] if len(found) == 1 else tuple(found)
        return sum(copy_bytes(leaf, key, form) for leaf in self._compact())

    def drop(self) -> None:
        """Forget the copies."""
        for leaf in self._leaves.values():
            leaf.copies.clear()

    def _compact(self) -> Iterator[Any]:
        """Yield the stand-ins of leaves that may have copies."""
        for attached in self._blocks:
            yield from (self._leaves[id(leaf)] for leaf in attached.compact_leaves)

    def _settle(self, state: BlockState, activations: Sequence[Tensor]) -> None:
        """Pick a block's neurons, and make stand-ins for it."""
        index = self._number[id(state)]
        named = state.pathways if any(own >= 0 for own in self.prompts.rows) else ()
        made = BlockState(state.key, state.d_ff)
        with torch.inference_mode(False), torch.no_grad():
            pairs = zip(self.prompts.picking, activations, strict=True)
            picked = [self._pick(index, row, own) for row, own in pairs]
            made.set_pathways((*picked, *named))
        made.masked_only, made.masked_outside = state.masked_only, state.masked_outside
        for leaf in self._blocks[index].leaves.values():
            self._leaves[id(leaf)] = _stand_in(leaf, made)
        self._states[id(state)] = made


def _stand_in(leaf: Any, state: BlockState) -> Any:
    """Return a leaf of the same class and with the same parameters, and a state of its own."""
    made = object.__new__(type(leaf))
    made.__dict__.update(leaf.__dict__)
    made.__dict__.update(state=state, copies={})
    return made

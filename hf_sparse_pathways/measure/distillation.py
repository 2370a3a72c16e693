"""From a dense model to sgatlin layers: blocks one by one, then together, and what that costs.

Each block's layer is reconstructed (``healing/reconstruction.py``) and compared on held-out
documents with the best linear map (ridge, in closed form) and with the mean output, whose error is
1; each alone takes the block's place in the model, for its perplexity beside the dense one's. Then
all layers together are trained end to end (``healing/distilling.py``), beside the dense model.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.resumption import digest_plan
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.trials import batch_loss, run_model
from hf_sparse_pathways.discovery.weights import weight_digest
from hf_sparse_pathways.discovery.windows import (
    Batch,
    Window,
    count_tokens,
    draw_windows,
    make_batches,
    resolve_length,
)
from hf_sparse_pathways.errors import PathwaysError, TextError, UnsupportedModelError, option
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.healing.checkpoints import Checkpoints
from hf_sparse_pathways.healing.distilling import EndToEnd, assemble, train_together
from hf_sparse_pathways.healing.reconstruction import (
    Reconstruction,
    in_place_of,
    observe,
    reconstruct,
)
from hf_sparse_pathways.measure.figures import Section, format_figure
from hf_sparse_pathways.modeling.structure import check_convertible
from hf_sparse_pathways.pathways.base import BlockShape
from hf_sparse_pathways.sgatlin.settings import SgatlinConfig
from hf_sparse_pathways.sgatlin.start import solve_ridge
from hf_sparse_pathways.tables import ShownAsTables

if TYPE_CHECKING:
    import os

    from hf_sparse_pathways.discovery.text import TextSource

HELD_OUT = 0.2
BATCH_SIZE = 8
CLOSED_FORMS = ("linear map", "mean output")
"""What a block's layer is compared with."""

Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stand:
    """What stands alone in one block's place, and how well.

    Attributes:
        block: Name of the block.
        name: ``"sgatlin"``, ``"linear map"`` or ``"mean output"``.
        flops: Of a token, over the block's.
        error: Squared error on held-out documents over that of the mean output.
        ratio: Perplexity with it over the dense model's.
    """

    block: str
    name: str
    flops: float
    error: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The whole model on held-out documents.

    Attributes:
        name: What stands in all the blocks' places.
        perplexity: Of it.
    """

    name: str
    perplexity: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Distilled(ShownAsTables):
    """A model with sgatlin layers beside the dense one that it was made from.

    Attributes:
        model: It; it is saved and loaded as every model of this package.
        stands: What stands alone in each block's place.
        wholes: The whole model: dense first.
        tokens: How many were trained on, and how many held out.
    """

    model: Any
    stands: Sequence[Stand]
    wholes: Sequence[Whole]
    tokens: tuple[int, int]

    def sections(self) -> list[Section]:
        """Return the tables."""
        dense = self.wholes[0].perplexity
        alone = [
            [
                one.block,
                one.name,
                f"{one.flops:.1%}",
                format_figure(one.error),
                format_figure(one.ratio),
            ]
            for one in self.stands
        ]
        together = [
            [one.name, format_figure(one.perplexity), format_figure(one.perplexity / dense)]
            for one in self.wholes
        ]
        note = (
            f"Trained on {self.tokens[0]} tokens, measured on {self.tokens[1]} of other documents."
        )
        return [
            Section(
                title="One block at a time",
                note=f"{note} Error: over the mean output's. Perplexity: over the dense model's.",
                header=["block", "in its place", "FLOPs", "error", "perplexity"],
                rows=alone,
            ),
            Section(
                title="All of them",
                note=note,
                header=["in the blocks' places", "perplexity", "over dense"],
                rows=together,
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the model."""
        return {
            "stands": [asdict(one) for one in self.stands],
            "wholes": [asdict(one) for one in self.wholes],
            "tokens": list(self.tokens),
        }

    def to_markdown(self) -> str:
        """Render the tables."""
        return "\n\n".join(section.to_markdown() for section in self.sections())


def distil(  # noqa: PLR0913
    model: Any,
    tokenizer: Any,
    text: "TextSource",
    ffn: SgatlinConfig,
    *,
    blocks: Sequence[int],
    max_tokens: int = 65_536,
    scored_tokens: int = 16_384,
    max_length: int | None = None,
    reconstruction: Reconstruction | None = None,
    end_to_end: EndToEnd | None = None,
    seed: int = 0,
    work_folder: "str | os.PathLike[str] | None" = None,
) -> Distilled:
    """Put sgatlin layers in place of FFN blocks of a dense model, and train them to be like it.

    The dense model is unchanged.

    Args:
        model: A dense causal LM.
        tokenizer: Its tokenizer.
        text: As ``sp.profile`` takes that of a domain; a fifth of the documents is held out.
        ffn: What the layers are made of.
        blocks: Which of its FFN blocks, from 0.
        max_tokens: Most tokens to train on.
        scored_tokens: Most held-out tokens to measure on.
        max_length: Most tokens of a window.
        reconstruction: How each layer is trained on its block.
        end_to_end: How all are trained together afterwards.
        seed: Decides which text is drawn.
        work_folder: Where finished blocks and the run of all together are stored: the same call
            goes on from there.

    Raises:
        UnsupportedModelError: The model has no FFN blocks, or some were replaced already.
        PathwaysError: There is no such block, or a number of tokens is below 2.
        TextError: There is too little text.
    """
    check_convertible(model)
    if getattr(model.config, "ffn", None) is not None:
        raise UnsupportedModelError(
            "The model has FFN layers of its own already, and a second set has no place in its "
            "configuration. Distil the dense model, and name all blocks at once."
        )
    chosen = _choose(find_blocks(model), blocks)
    for name, most in (("max_tokens", max_tokens), ("scored_tokens", scored_tokens)):
        if type(most) is not int or most < 2:  # the first of a window is not predicted
            raise PathwaysError(
                f"{option(name)} has to be a whole number from 2, got {most!r:.200}."
            )
    train, test = _draw(model, tokenizer, text, (max_tokens, scored_tokens), max_length, seed)
    alone, together = reconstruction or Reconstruction(), end_to_end or EndToEnd()
    with ExitStack() as stack:
        folder = Path(work_folder or stack.enter_context(TemporaryDirectory()))
        plan = {"weights": weight_digest(model), "text": _digest(train), "ffn": ffn.to_dict()}
        store = _Store(folder, {**plan, "reconstruction": asdict(alone)})
        layers, stands, wholes = {}, [], [_measure("dense", model, test)]
        instead: dict[str, list[Compute]] = {name: [] for name in CLOSED_FORMS}
        for number, block in chosen.items():
            x, y = observe(model, block, _batches(train))
            layers[number] = reconstruct(x, y, ffn, alone, store.checkpoints(number))
            candidates: dict[str, Compute] = {"sgatlin": layers[number], **_solve(x, y)}
            stands += _stand(model, block, test, candidates, wholes[0])
            for name, computes in instead.items():
                computes.append(candidates[name])
        for name, computes in instead.items():
            with _all_in_place(chosen.values(), computes):
                wholes.append(_measure(f"{name}s", model, test))
        student = assemble(model, layers)
        wholes.append(_measure("sgatlin, each by itself", student, test))
        if together.steps:
            train_together(student, model, train, together, store.run(chosen, together))
            wholes.append(_measure("sgatlin, then end to end", student, test))
    tokens = (count_tokens(train), count_tokens(test))
    return Distilled(model=student, stands=stands, wholes=wholes, tokens=tokens)


@dataclass(frozen=True)
class _Store:
    """Where unfinished work of one plan lies."""

    folder: Path
    plan: Mapping[str, Any]

    def checkpoints(self, block: int) -> Checkpoints:
        """Return where a block's layer is stored."""
        return Checkpoints(self.folder, {**self.plan, "block": block})

    def run(self, blocks: Iterable[int], together: EndToEnd) -> Path:
        """Return where the run of all layers together is stored."""
        plan = {**self.plan, "blocks": sorted(blocks), "together": asdict(together)}
        return self.folder / f"together-{digest_plan(plan)}"


def _choose(found: Sequence[FfnBlock], blocks: Sequence[int]) -> dict[int, FfnBlock]:
    """Return the blocks of some numbers, in the model's order."""
    for number in blocks:
        if not 0 <= number < len(found):
            raise PathwaysError(f"There is no block {number}: the model has {len(found)}, from 0.")
    if not blocks:
        raise PathwaysError("No block was named. Say which FFN blocks are replaced, from 0.")
    return {number: found[number] for number in sorted({*blocks})}


def _draw(
    model: Any,
    tokenizer: Any,
    text: "TextSource",
    tokens: tuple[int, int],
    max_length: int | None,
    seed: int,
) -> tuple[list[Window], list[Window]]:
    """Return windows to train on, and held-out ones.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: The text.
        tokens: Most of each.
        max_length: Most tokens of a window.
        seed: Decides which text is drawn.
    """
    length = resolve_length(model, max_length)
    parts = read_documents(text, seed=seed, tokens=sum(tokens)).split(HELD_OUT, seed)
    drawn = []
    for part, most in zip(parts, tokens, strict=True):
        windows = draw_windows(part, tokenizer, max_tokens=most, max_length=length, seed=seed)
        drawn.append([window for window in windows if len(window.ids) > 1])
    if not all(drawn):
        raise TextError("The text is too short to hold a part of it out. Give more.")
    return drawn[0], drawn[1]


def _digest(windows: Sequence[Window]) -> str:
    """Return what identifies some windows' tokens."""
    return hashlib.sha256(repr([window.ids for window in windows]).encode()).hexdigest()


def _batches(windows: Sequence[Window]) -> list[Batch]:
    return list(make_batches(windows, BATCH_SIZE))


def _solve(x: Tensor, y: Tensor) -> dict[str, Compute]:
    """Return what a block's outputs are compared with: the best affine map, and their mean."""
    mean = y.mean(0)
    affine = solve_ridge(_with_ones(x).double(), y.double()).float()
    return {
        "linear map": lambda given: _with_ones(given) @ affine.to(given),
        "mean output": lambda given: mean.expand(given.shape).to(given),
    }


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


@torch.no_grad()
def _stand(
    model: Any,
    block: FfnBlock,
    test: Sequence[Window],
    candidates: Mapping[str, Compute],
    dense: Whole,
) -> list[Stand]:
    """Return how well each candidate stands in one block's place.

    Args:
        model: The model.
        block: Its block.
        test: Held-out text.
        candidates: Name -> function; the mean output is among them.
        dense: The model as it is, on the same text.
    """
    x, y = observe(model, block, _batches(test))
    errors = {name: float((own(x) - y).square().sum()) for name, own in candidates.items()}
    flops = {"sgatlin": getattr(candidates["sgatlin"], "flops", 0)}
    flops["linear map"] = 2 * block.d_in * block.d_out
    stands = []
    for name, compute in candidates.items():
        with in_place_of(block, compute):
            perplexity = _measure(name, model, test).perplexity
        stands.append(
            Stand(
                block=block.name,
                name=name,
                flops=flops.get(name, 0) / (2 * BlockShape.of(block, "").dense_flops),
                error=errors[name] / errors["mean output"],
                ratio=perplexity / dense.perplexity,
            )
        )
    return stands


@contextmanager
def _all_in_place(blocks: Iterable[FfnBlock], computes: Sequence[Compute]) -> Iterator[None]:
    with ExitStack() as stack:
        for block, compute in zip(blocks, computes, strict=True):
            stack.enter_context(in_place_of(block, compute))
        yield


def _measure(name: str, model: Any, test: Sequence[Window]) -> Whole:
    return Whole(name=name, perplexity=math.exp(mean_loss(model, _batches(test))[0]))


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch]) -> tuple[float, int]:
    """Return the mean loss of all tokens that have one before them, in nats, and their number."""
    total, tokens = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            loss, count = batch_loss(run_model(model, batch), batch)
            total, tokens = total + loss, tokens + count
    return total / tokens, tokens

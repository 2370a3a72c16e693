"""A sgatlin layer trained to do what one dense FFN block does, and what that costs in quality.

The block's inputs and outputs are gathered over text; the layer is trained on them by Adam on the
squared error, and compared on held-out documents with the best linear map (ridge, in closed form)
and with the mean output, whose error is 1. Then each takes the block's place in the model, for its
perplexity beside the dense one's.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.passes import Finished, evaluation_mode, run_decoder
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.trials import batch_loss, run_model
from hf_sparse_pathways.discovery.windows import Batch, draw_windows, make_batches, resolve_length
from hf_sparse_pathways.errors import PathwaysError, TextError
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.measure.figures import format_figure, markdown_table
from hf_sparse_pathways.pathways.base import BlockShape
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN
from hf_sparse_pathways.sgatlin.settings import SgatlinConfig

if TYPE_CHECKING:
    from hf_sparse_pathways.discovery.text import TextSource

HELD_OUT = 0.2
RIDGE = 1e-4
"""Of the linear map, in mean squares of an input."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a layer is trained.

    Attributes:
        steps: Of Adam.
        batch: Tokens of a step.
        learning_rate: The first; it falls to 0 along a cosine.
        seed: Decides text, first weights and batches.
    """

    steps: int = 1000
    batch: int = 512
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Stand:
    """What stands in a block's place, and how well.

    Attributes:
        name: ``"sgatlin"``, ``"linear map"`` or ``"mean output"``.
        flops: Of a token.
        error: Squared error on held-out documents over that of the mean output.
        ratio: Perplexity with it over the dense model's.
    """

    name: str
    flops: int
    error: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A trained layer beside its partners.

    Attributes:
        layer: The layer.
        block: Name of the block.
        dense_flops: The block's, of a token.
        perplexity: The dense model's, on the held-out documents.
        tokens: How many it was trained on, and how many were held out.
        stands: The layer and its partners.
    """

    layer: SgatlinFFN
    block: str
    dense_flops: int
    perplexity: float
    tokens: tuple[int, int]
    stands: Sequence[Stand]

    def to_markdown(self) -> str:
        """Return a table and a sentence."""
        rows = [
            [
                stand.name,
                f"{stand.flops / self.dense_flops:.1%}",
                format_figure(stand.error),
                format_figure(stand.ratio),
            ]
            for stand in self.stands
        ]
        dense = format_figure(self.perplexity)
        note = (
            f"{self.block}, trained on {self.tokens[0]} tokens. On {self.tokens[1]} others: error "
            f"over the mean output's, and perplexity over the dense {dense}."
        )
        return f"{note}\n\n{markdown_table(['in its place', 'FLOPs', 'error', 'perplexity'], rows)}"


def distil_block(  # noqa: PLR0913
    model: Any,
    tokenizer: Any,
    text: "TextSource",
    block: int,
    config: SgatlinConfig,
    *,
    max_tokens: int = 16_384,
    training: Training | None = None,
) -> Distilled:
    """Train a sgatlin layer to do what a dense model's FFN block does; the model is unchanged.

    Args:
        model: A dense causal LM.
        tokenizer: Its tokenizer.
        text: As ``sp.profile`` takes that of a domain; a fifth of the documents is held out.
        block: Which of its FFN blocks, from 0.
        config: What the layer is made of.
        max_tokens: Most tokens to train on.
        training: How.

    Raises:
        UnsupportedModelError: The model has no FFN blocks.
        PathwaysError: There is no such block.
        TextError: There is too little text.
    """
    blocks, training = find_blocks(model), training or Training()
    if not 0 <= block < len(blocks):
        raise PathwaysError(f"There is no block {block}: the model has {len(blocks)}, from 0.")
    own = blocks[block]
    train, test = _draw(model, tokenizer, text, max_tokens, training.seed)
    x, y = _gather(model, own, train)
    torch.manual_seed(training.seed)
    layer = SgatlinFFN(config, own.d_in)
    fit(layer, x, y, training)
    linear, mean = _solve_linear(x, y), y.mean(0)
    candidates: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
        "sgatlin": (layer.flops, layer),
        "linear map": (2 * own.d_in * own.d_out, lambda given: _affine(given, linear)),
        "mean output": (0, lambda given: mean.expand(given.shape).to(given)),
    }
    perplexity, stands, scored = _measure(model, own, test, mean, candidates)
    return Distilled(
        layer=layer,
        block=own.name,
        dense_flops=2 * BlockShape.of(own, "").dense_flops,
        perplexity=perplexity,
        tokens=(len(x), scored),
        stands=stands,
    )


def _measure(
    model: Any,
    block: FfnBlock,
    test: Sequence[Batch],
    mean: Tensor,
    candidates: Mapping[str, tuple[int, Callable[[Tensor], Tensor]]],
) -> tuple[float, list[Stand], int]:
    """Return the dense perplexity, what each candidate makes of it, and how many tokens there are.

    Args:
        model: The model.
        block: Its block.
        test: Held-out text.
        mean: The block's mean output, ``(d_model,)``.
        candidates: Name -> FLOPs and function.
    """
    inputs, outputs = _gather(model, block, test)
    dense, _ = mean_loss(model, test)
    stands = []
    for name, (flops, compute) in candidates.items():
        with torch.no_grad():
            squared = (compute(inputs) - outputs).square().sum()
        error = float(squared / (outputs - mean).square().sum())
        with in_place_of(block, compute):
            loss, _ = mean_loss(model, test)
        stands.append(Stand(name=name, flops=flops, error=error, ratio=math.exp(loss - dense)))
    return math.exp(dense), stands, len(inputs)


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch]) -> tuple[float, int]:
    """Return the mean loss of all tokens that have one before them, in nats, and their number."""
    total, tokens = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            loss, count = batch_loss(run_model(model, batch), batch)
            total, tokens = total + loss, tokens + count
    return total / tokens, tokens


def fit(layer: SgatlinFFN, x: Tensor, y: Tensor, training: Training) -> None:
    """Train a layer on inputs and outputs ``(tokens, d_model)``, in place."""
    scale = (y - y.mean(0)).square().mean()
    optimizer = torch.optim.Adam(layer.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    generator = torch.Generator().manual_seed(training.seed)
    for _ in range(training.steps):
        chosen = torch.randint(0, len(x), (training.batch,), generator=generator)
        loss = (layer(x[chosen]) - y[chosen]).square().mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@contextmanager
def in_place_of(block: FfnBlock, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, let a function of a FFN block's input give its output, on all threads."""
    seen: list[Tensor] = []
    hooks = [
        block.incoming[0].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        block.outgoing.register_forward_hook(lambda *_: compute(seen.pop())),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _draw(
    model: Any, tokenizer: Any, text: "TextSource", max_tokens: int, seed: int
) -> tuple[list[Batch], list[Batch]]:
    """Return batches to train on, and held-out ones."""
    parts = read_documents(text, seed=seed, tokens=max_tokens).split(HELD_OUT, seed)
    length = resolve_length(model, None)
    drawn = []
    for part, most in zip(parts, (max_tokens, int(HELD_OUT * max_tokens)), strict=True):
        windows = draw_windows(part, tokenizer, max_tokens=most, max_length=length, seed=seed)
        drawn.append(list(make_batches([w for w in windows if len(w.ids) > 1], 8)))
    if not all(drawn):
        raise TextError("The text is too short to hold a part of it out. Give more.")
    return drawn[0], drawn[1]


@torch.no_grad()
def _gather(model: Any, block: FfnBlock, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Return a block's inputs and outputs, float32 ``(tokens, d_model)``, without padding."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def finish(_: Any, __: Any, output: Tensor) -> None:
        outputs.append(output)
        raise Finished

    hooks = [
        block.incoming[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        block.outgoing.register_forward_hook(finish),
    ]
    try:
        with evaluation_mode(model):
            for batch in batches:
                run_decoder(model, batch)
                for kept in (inputs, outputs):
                    kept[-1] = kept[-1].flatten(0, -2)[batch.mask.flatten()].float()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(inputs), torch.cat(outputs)


def _solve_linear(x: Tensor, y: Tensor) -> Tensor:
    """Return the affine map ``(d_model + 1, d_model)`` of least squared error, with a ridge."""
    ones = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
    gram = ones.T @ ones
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, ones.T @ y.double()).float()


def _affine(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix[:-1].to(x) + matrix[-1].to(x)

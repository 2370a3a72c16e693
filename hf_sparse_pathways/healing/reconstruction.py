"""One FFN block of a dense model as a sgatlin layer: trained on the block's inputs and outputs.

The block is observed while the dense model reads; the layer begins as a linear map (``start.py``)
and is trained by Adam on the squared error. No other layer takes part, so blocks can be trained in
any order, and a finished one is stored.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.passes import Finished, evaluation_mode, run_decoder
from hf_sparse_pathways.discovery.windows import Batch
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.healing.checkpoints import Checkpoints
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN
from hf_sparse_pathways.sgatlin.settings import SgatlinConfig
from hf_sparse_pathways.sgatlin.start import start_linear


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How a layer is trained on its block.

    Attributes:
        steps: Of Adam.
        batch: Tokens of a step.
        learning_rate: The first; it falls to 0 along a cosine.
        seed: Of first weights and batches.

    Raises:
        PathwaysError: A number is out of range.
    """

    steps: int = 1000
    batch: int = 512
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch - 1) < 0 or not self.learning_rate > 0:
            raise PathwaysError(
                "A block is reconstructed in 0 steps or more, of 1 token or more, with a learning "
                f"rate above 0; got {self}."
            )


def reconstruct(
    x: Tensor,
    y: Tensor,
    config: SgatlinConfig,
    settings: Reconstruction,
    checkpoints: Checkpoints,
) -> SgatlinFFN:
    """Return a layer that does what a block does, or the one that was stored.

    Args:
        x: The block's inputs, float32 ``(tokens, d_model)``.
        y: Its outputs, of the same shape.
        config: What the layer is made of.
        settings: How it is trained.
        checkpoints: Where it is stored when it is done.

    Raises:
        ArtefactError: What was stored is damaged.
    """
    torch.manual_seed(settings.seed)
    layer = SgatlinFFN(config, x.shape[1])
    stored = checkpoints.load(layer.state_dict())
    if stored is not None:
        layer.load_state_dict(stored[1]["layer"])
        return layer
    start_linear(layer, x, y)
    _fit(layer, x, y, settings)
    checkpoints.store(asdict(settings), {"layer": layer.state_dict()})
    return layer


def _fit(layer: SgatlinFFN, x: Tensor, y: Tensor, settings: Reconstruction) -> None:
    """Train a layer, in place."""
    if not settings.steps:
        return
    scale = (y - y.mean(0)).square().mean()
    optimizer = torch.optim.Adam(layer.parameters(), lr=settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.steps):
        chosen = torch.randint(0, len(x), (settings.batch,), generator=generator)
        loss = (layer(x[chosen]) - y[chosen]).square().mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@contextmanager
def in_place_of(block: FfnBlock, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, let a function of a FFN block's input give its output, on all threads.

    The function computes in float32.
    """
    seen: list[Tensor] = []
    hooks = [
        block.incoming[0].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        block.outgoing.register_forward_hook(
            lambda _, __, output: compute(seen.pop().float()).to(output.dtype)
        ),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def observe(model: Any, block: FfnBlock, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
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
